"""One verb a file: assembles what the other rooms offer, computes nothing."""
