"""Turn a recipe into work. Its folders are layers, from train to inputs; the order is a contract in pyproject.toml."""
