"""A handler that does what its event says, for tests with real worker processes."""

import os
import signal
import time
from pathlib import Path

from spark_outbox import Event, handler
from tests.challenges.models import Handled


@handler(r"^probe_in_time$", timeout=0.2, name="in time")
@handler(r"^probe(?!_in_time)")
def probe(event: Event) -> None:
    """Note the call in the ledger; then touch `started`, wait for `go`, raise, or die, as told."""
    Handled.objects.create(key=event.key, handler="probe", note=str(os.getpid()))
    if "started" in event:
        Path(event["started"]).write_text(str(os.getpid()))
    if "go" in event:
        while not Path(event["go"]).exists():
            time.sleep(0.005)
    if "raise" in event:
        raise RuntimeError(event["raise"])
    if "die_unless" in event and not Path(event["die_unless"]).exists():
        Path(event["die_unless"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
