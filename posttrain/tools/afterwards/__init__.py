"""What comes after training: a model is talked to, measured, merged, shared and looked at."""
