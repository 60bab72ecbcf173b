"""The model of the paper in plain PyTorch, independent of ranks, devices and files."""
