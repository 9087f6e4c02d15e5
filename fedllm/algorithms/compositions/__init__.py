"""What goes around a rule: another step of the server, another step of the clients."""
