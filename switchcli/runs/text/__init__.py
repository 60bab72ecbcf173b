"""Prepare text and train tokenizers, for the verb data."""
