"""Who this worker is, to people."""

import os
import re
import socket


def identity() -> str:
    """Return the host and the process: `host:pid`."""
    return f"{re.sub('[^A-Za-z0-9._-]', '', socket.gethostname())}:{os.getpid()}"
