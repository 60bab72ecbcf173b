"""What a run reads and writes besides its own folder: checkpoints, texts and tasks, as a model takes them."""
