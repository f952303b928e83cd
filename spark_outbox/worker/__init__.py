"""The worker: claim, dispatch and settle events; and sleep while there are none. loop.py comes first."""
