"""The outbox in the Django admin."""
