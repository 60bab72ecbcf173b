"""Checkpoints of other systems: read, and write in their layout."""
