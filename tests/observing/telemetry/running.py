"""Runs an emitter and a worker, in processes of their own, under settings that export into files."""

import json
import signal
from pathlib import Path
from typing import Any

from tests.tools import WorkerProcess, manage, wait_until_ended

SECRET = "what only the payload has"

MANY = [{"group": "seen_list", "key": key, "secret": SECRET} for key in ("good", "bad")]


def emit_elsewhere(folder: Path, script: str, *, settings: str, **environment: str) -> list[Any]:
    """Run Python in a process of its own; return what it exported."""
    environment |= _exports(folder, settings)
    file = folder.with_suffix(".py")  # Sentry exports the command, too
    file.write_text(f"from spark_outbox import emit, emit_many\n{script}")
    done = manage("shell", "--command", f"exec(open({str(file)!r}).read())", **environment)
    assert done.returncode == 0, done.stderr
    return _exported(folder)


def handle_elsewhere(folder: Path, *, settings: str, **environment: Any) -> list[Any]:
    """Run a worker until everything is handled; return what its processes exported."""
    environment |= _exports(folder, settings)
    with WorkerProcess("--commit-interval", "60", **environment) as worker:
        worker.wait_until_ready()
        wait_until_ended()
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0, worker.output
        assert "send_robust" not in worker.output, worker.output  # no receiver has failed
    return _exported(folder)


def _exports(folder: Path, settings: str) -> dict[str, str]:
    folder.mkdir()
    module = f"tests.observing.telemetry.{settings}"
    return {"DJANGO_SETTINGS_MODULE": module, "TELEMETRY": str(folder)}


def _exported(folder: Path) -> list[Any]:
    lines = [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]
