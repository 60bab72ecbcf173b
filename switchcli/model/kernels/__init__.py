"""Formulas of the model, made fast for one kind of processor."""
