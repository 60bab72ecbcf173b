"""Processes and devices: the mesh, expert, tensor and data parallelism, collectives, launching."""
