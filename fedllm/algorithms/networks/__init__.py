"""Rules on whole networks, their sub-models and factorizations."""
