"""Where the clients of a round run."""
