"""Rules that leave each client a model of its own."""
