"""What a trained model does: its guesses, its routing, and what its experts specialize in."""
