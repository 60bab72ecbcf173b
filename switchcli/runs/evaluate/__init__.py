"""Measure and compare models: the verb eval, scores, routing, comparison of runs, examination of checkpoints."""
