"""What tools do about images: `seen` counts what they take, for a plan."""
