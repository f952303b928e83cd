"""Payloads and references."""
