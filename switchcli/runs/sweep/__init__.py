"""Many runs: lists of commands, processes that run them, and jobs of a cluster."""
