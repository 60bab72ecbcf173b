"""Checkpoints on disk: format, verification, file operations, locks. Knows nothing about recipes."""
