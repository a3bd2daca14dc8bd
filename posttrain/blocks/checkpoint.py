"""Checkpoint blocks."""
