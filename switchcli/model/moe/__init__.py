"""The sparse layer: routers, dispatch, experts, auxiliary losses, statistics (section 2 of the paper)."""
