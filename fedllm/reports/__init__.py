"""The report of a run, from the run's files."""
