"""Is a Switch model sound? Probes that look at it from outside, whoever's code it runs in."""
