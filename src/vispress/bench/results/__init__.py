"""Results folders: one file a cell, read back as statistics, tables and plots."""
