"""YAML text in, one frozen value out."""
