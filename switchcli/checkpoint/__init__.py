"""Checkpoints on disk: format, verification, file operations. This package knows nothing about recipes."""
