"""Checkpoints on disk: format, verification, file operations, locks. This package knows nothing about recipes."""
