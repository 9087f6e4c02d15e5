"""The server's work between the replies and the average: admission, guards, telemetry."""
