"""Text preparation: documents as token IDs on disk, written once, and then memory-mapped."""
