"""Resolve a command line into a job: the recipe with every key, the checkpoints that it names, and the run's folder."""
