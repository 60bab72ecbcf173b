"""Turn a recipe into a run: train, evaluate, distill, save and resume."""
