"""Callback blocks that ship with posttrain."""
