"""Scores of a run, an adapter or a model, with receipts."""
