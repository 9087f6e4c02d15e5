"""Strict, typed sections of a page."""
