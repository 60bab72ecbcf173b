"""`switchcli plan`: the step of a recipe or of a size on given devices."""
