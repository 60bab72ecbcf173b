"""What people and scripts read: the console and the metrics files."""
