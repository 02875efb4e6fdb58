"""One loop, one jitted step, and what a run leaves in its folder."""
