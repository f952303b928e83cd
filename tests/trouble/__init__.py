TROUBLE = "tests.probe tests.trouble"
"""EXTRA_APPS of a worker process that has these handlers beside the usual ones."""
