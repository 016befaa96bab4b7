"""Checkpoint formats: each module reads or writes one kind of file and knows nothing of recipes or grids."""
