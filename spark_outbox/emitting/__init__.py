"""Write events into the outbox: by emit(), and from sources."""
