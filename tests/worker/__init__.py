"""The worker: its batches, its sleep, and what goes wrong."""
