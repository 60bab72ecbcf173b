"""The sparse layer: routers, dispatch, experts, auxiliary losses and statistics (section 2 of the paper)."""
