"""Text preparation: documents as token IDs on disk, written once and verified when they are read."""
