"""The verbs of the command line, one per file: options become a job of runs/, and its result is printed."""
