"""Handlers and sources, as the project has registered them."""
