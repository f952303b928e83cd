"""A handler that does what its event says, for tests with real worker processes."""

import ctypes
import os
import time
from pathlib import Path

from spark_outbox import Event, handler
from tests.challenges.models import Handled


@handler(r"^probe_in_time$", timeout=0.2, name="in time")
@handler(r"^probe(?!_in_time|_crash)")
def probe(event: Event) -> None:
    """Note the call in the ledger; then touch `started`, wait for `go`, or raise, as told."""
    Handled.objects.create(key=event.key, handler="probe", note=str(os.getpid()))
    if "started" in event:
        Path(event["started"]).write_text(str(os.getpid()))
    if "go" in event:
        while not Path(event["go"]).exists():
            time.sleep(0.005)
    if "raise" in event:
        raise RuntimeError(event["raise"])


@handler(r"^probe_crash$", name="crash", max_attempts=2, backoff=0.1)
def crash(event: Event) -> None:
    Handled.objects.create(key=event.key, handler="crash")
    ctypes.string_at(0)
