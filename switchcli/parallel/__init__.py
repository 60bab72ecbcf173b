"""Processes and devices: the only room that knows accelerate and ranks."""
