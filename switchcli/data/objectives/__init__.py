"""Pre-training objectives: what a model reads of a text, and what it has to predict."""
