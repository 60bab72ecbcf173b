"""Checkpoints on disk: format, verification, the folder of a run. This package knows nothing about recipes."""
