"""`switchcli sweep`: lists of commands, and the processes that run them."""
