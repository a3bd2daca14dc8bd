"""Callbacks blocks."""
