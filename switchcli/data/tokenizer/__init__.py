"""Tokenizers in T5's layout: load, train and measure them."""
