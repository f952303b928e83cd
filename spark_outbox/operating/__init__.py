"""What people do to an outbox: look, retry, discard, replay, pause, prune. Commands stand on it."""
