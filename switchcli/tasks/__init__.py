"""Text-to-text tasks: their formats, metrics and sources. A family a file; no model and no ranks."""
