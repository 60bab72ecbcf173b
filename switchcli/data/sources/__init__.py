"""Sources of documents: files, Parquet, the standard library of Python, datasets of a hub."""
