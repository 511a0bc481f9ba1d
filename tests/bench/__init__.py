"""What the service can carry: `python -m tests.bench`."""
