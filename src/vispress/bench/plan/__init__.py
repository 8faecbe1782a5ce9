"""Plans of runs: their cells, the controls beside them, where numbers come from."""
