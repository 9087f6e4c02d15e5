"""The messages between server and clients, as bytes."""
