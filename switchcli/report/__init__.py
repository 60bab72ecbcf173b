"""`switchcli report`: runs compared, as tables, charts and a page, and the routing of a checkpoint."""
