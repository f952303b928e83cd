"""The dashboard, in the Django admin: pages that show the outbox at a glance."""
