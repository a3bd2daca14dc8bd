"""Logger blocks."""
