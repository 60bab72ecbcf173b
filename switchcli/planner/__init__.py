"""Plan a run: parameters, FLOPs, and the memory of each mesh."""
