"""The files that a run reads and writes."""
