"""The paper's model in plain PyTorch: no ranks, no devices, no files."""
