"""Where visual tokens stand: grids, crops, segments, windows."""
