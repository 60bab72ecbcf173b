"""Text in, batches out: a batch is a function of (seed, step)."""
