"""What a trained router does."""
