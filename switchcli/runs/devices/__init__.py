"""How a run uses its machine: the mesh of its ranks, accelerate's settings, and the plan of a step."""
