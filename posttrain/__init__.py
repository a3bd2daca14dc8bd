"""Post-training for language models: one loop, replaceable blocks."""
