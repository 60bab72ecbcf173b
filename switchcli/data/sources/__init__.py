"""Sources of documents: files, Parquet, Python's standard library, datasets of the Hugging Face hub."""
