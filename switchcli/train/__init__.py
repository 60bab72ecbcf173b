"""One loop and what it needs: objective, optimizer, schedule, metrics, checkpoint."""
