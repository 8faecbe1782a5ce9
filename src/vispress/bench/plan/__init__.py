"""What a run does: plans, their cells, the controls beside them, where numbers come from."""
