"""Parts that several methods share, or that are too long to stand in one."""
