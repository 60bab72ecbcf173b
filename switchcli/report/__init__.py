"""What people and scripts read: the console, metrics files, tables, charts and the page of a report."""
