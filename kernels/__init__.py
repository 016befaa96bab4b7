"""Functions of arrays and integers that are slow enough to measure; no names, paths, files or threads."""
