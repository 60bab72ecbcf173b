"""Checkpoints of other systems: read them, and write their layout."""
