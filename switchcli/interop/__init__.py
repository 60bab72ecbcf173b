"""Checkpoints of other systems, to and from ours."""
