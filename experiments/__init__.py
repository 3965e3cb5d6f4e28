"""Experiments: the only code of the project with flags, files and clocks."""
