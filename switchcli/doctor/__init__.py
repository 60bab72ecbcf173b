"""Probes that find out whether a Switch model is sound, by running it in the code of any package."""
