"""The tables and pictures of several runs beside each other."""
