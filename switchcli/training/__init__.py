"""Training: losses, optimizers, schedules, the loop, its callbacks and metrics, checkpoints, and evaluation."""
