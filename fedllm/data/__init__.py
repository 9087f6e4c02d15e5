"""Rows: their sources, tokens and partition over clients."""
