"""Device code, each module imported by one backend."""
