"""Make a model of another one: convert, upcycle, prune."""
