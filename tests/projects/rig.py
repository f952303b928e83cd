"""One project on a database of its own: its processes, the webhooks that it calls, and its books."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
from django.conf import settings
from psycopg.conninfo import make_conninfo

from tests.postgres import ROOT
from tests.projects.client import NAMES
from tests.tools import WorkerProcess, eventually, manage

PATIENCE = 300.0
"""Seconds within which so many events must be there, and after the last request have ended."""

EVENTS = "select key from spark_outbox_event"


class Webhooks(ThreadingHTTPServer):
    """Counts the calls by key. The first call for one key of ten gets status 503."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Webhook)
        self.calls: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def take(self, key: str) -> bool:
        with self.lock:
            self.calls[key] += 1
            refused = sum(key.encode()) % 10 == 0 and self.calls[key] == 1
            self.accepted[key] += not refused
        return not refused


class Webhook(BaseHTTPRequestHandler):
    server: Webhooks

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if self.server.take(self.headers["Idempotency-Key"]) else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class Project:
    """Use it as a context manager, which ends all of its processes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder
        self._stack = ExitStack()
        self._drivers: dict[str, subprocess.Popen[str]] = {}
        self.url = make_conninfo(settings.SERVER.url, dbname=f"projects_{name}")
        self.webhooks = Webhooks()
        self.environment: dict[str, Any] = {
            "DJANGO_SETTINGS_MODULE": f"tests.projects.{name}.settings",
            "WEBHOOKS": self.webhooks.url,
            "PYTHONPATH": str(ROOT),
        }

    def __enter__(self) -> "Project":
        self._stack.callback(self.webhooks.server_close)
        threading.Thread(target=self.webhooks.serve_forever, daemon=True).start()
        self._stack.callback(self.webhooks.shutdown)
        with psycopg.connect(settings.SERVER.url, autocommit=True) as server:
            server.execute(f"drop database if exists projects_{self.name} with (force)")
            server.execute(f"create database projects_{self.name}")
        self.manage("migrate", "--run-syncdb")
        self._database = self._stack.enter_context(psycopg.connect(self.url, autocommit=True))
        self._worker = self._start_worker()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def manage(self, *arguments: str) -> None:
        done = manage(*arguments, url=self.url, **self.environment)
        assert done.returncode == 0, done.stderr

    def start(self, *arguments: str, log: str) -> "subprocess.Popen[str]":
        """Start Python with these arguments, in the project's environment."""
        with (self._folder / f"{log}.log").open("a") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **self.environment, "DATABASE_URL": self.url},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self._stack.enter_context(process)  # which waits for its end
        self._stack.callback(process.kill)
        return process

    def drive(self, requests: int) -> Counter[str]:
        """Have several processes send so many requests each, and the workers killed meanwhile. Return
        what they have counted."""
        self.manage("shell", "-c", f"from tests.projects.{self.name}.drive import prepare; prepare()")
        for name in NAMES:
            self.start_driver(name, str(requests))
        self.hurt(requests)
        return sum(map(Counter, self.results()), Counter[str]())

    def start_driver(self, name: str, *arguments: str) -> None:
        module = f"tests.projects.{self.name}.drive"
        self._drivers[name] = self.start("-m", module, name, *arguments, log=name)

    def results(self) -> list[dict[str, Any]]:
        """Wait for the drivers; return what they print in their last lines."""
        outputs = [driver.communicate()[0] for driver in self._drivers.values()]
        self._check_drivers()
        return [json.loads(output.splitlines()[-1]) for output in outputs]

    def _check_drivers(self) -> None:
        for name, driver in self._drivers.items():
            assert not driver.poll(), (self._folder / f"{name}.log").read_text()[-3000:]

    def wait_for_events(self, count: int) -> None:
        """Wait until more events than `count` were emitted."""

        def there() -> set[str]:
            self._check_drivers()
            return self.keys(f"{EVENTS} offset %s limit 1", count)

        eventually(there, patience=PATIENCE)

    def hurt(self, events: int) -> None:
        """After so many events kill -9 the supervisor, whose children find out by themselves. After as
        many again kill -9 all of them. Start others at once."""
        self.wait_for_events(events)
        self._worker.signal(signal.SIGKILL)
        assert self._worker.wait() == -signal.SIGKILL
        self._worker = self._start_worker()
        self.wait_for_events(2 * events)
        self._worker.kill()
        self._worker = self._start_worker()

    def _start_worker(self) -> WorkerProcess:
        worker = WorkerProcess("--processes", "2", url=self.url, **self.environment)
        return self._stack.enter_context(worker).wait_until_ready()

    def settle(self) -> None:
        """Wait until no event waits, and stop the workers."""
        waiting = f"{EVENTS} where status in ('pending', 'running') limit 1"
        eventually(lambda: not self.keys(waiting), patience=PATIENCE)
        self._worker.signal(signal.SIGTERM)
        assert self._worker.wait() == 0

    def keys(self, sql: str, *params: object) -> set[str]:
        return {key for (key,) in self._database.execute(sql, params or None)}

    def counts(self, sql: str) -> dict[str, int]:
        return dict(self._database.execute(sql).fetchall())

    def faults(
        self, owed: set[str], *, possible: frozenset[str] | set[str] = frozenset()
    ) -> dict[str, set[str]]:
        """Return keys of events for which the books do not balance, by what is wrong.

        `owed` are the events of what was committed. Those that are `possible` may be there or not.
        Call it when the workers have stopped: it sweeps.
        """
        events = self.keys(EVENTS)
        not_done = self.keys(f"{EVENTS} where status <> 'done'")
        self.manage("process_spark_sources")
        return {
            "lost": owed - events,
            "of what was rolled back": events - owed - possible,
            "left to a sweep": self.keys(EVENTS) - events,
            "not done": not_done,
            "not mailed": events - self.keys("select key from ledger_mail"),
            "mailed twice": self.keys("select key from ledger_mail group by key having count(*) > 1"),
            "mailed without an event": self.keys("select key from ledger_mail") - events,
            "not posted": events - self.webhooks.accepted.keys(),
            "posted without an event": self.webhooks.calls.keys() - events,
        }

    def figures(self) -> dict[str, int]:
        return {
            "events": len(self.keys(EVENTS)),
            "mails": len(self.keys("select id::text from ledger_mail")),
            "webhooks": len(self.webhooks.accepted),
            "webhooks called again": self.webhooks.accepted.total() - len(self.webhooks.accepted),
            "webhooks refused at first": self.webhooks.calls.total() - self.webhooks.accepted.total(),
        }
