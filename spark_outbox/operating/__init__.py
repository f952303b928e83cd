"""What people do to the outbox: look, retry, discard, replay, prune. Commands are thin over it."""
