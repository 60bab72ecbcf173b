"""Plan a run: parameters, FLOPs, memory, traffic and seconds of each mesh."""
