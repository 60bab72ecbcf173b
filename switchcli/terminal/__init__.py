"""What everything prints with, and the files of metrics: console, tables, units, safe text."""
