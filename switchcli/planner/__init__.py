"""What a step of training costs: FLOPs, and the memory of each mesh. `parallel: auto` chooses by it."""
