"""Recipes: YAML text to one frozen value."""
