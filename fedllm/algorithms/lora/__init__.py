"""Rules on low-rank adapters of frozen weights."""
