"""Shared by the tests: waiting for a condition, connections and workers of their own, and the state of
the outbox and the ledger."""

import contextlib
import http.client
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from django.conf import settings
from django.db import connection, connections
from django.utils import timezone
from psycopg.conninfo import make_conninfo

from spark_outbox import Event, emit
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Challenge, Handled

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds after which a test stops waiting for something that should happen at once."""

HOUR = 3600.0


def eventually(probe: Callable[[], T], *, patience: float = PATIENCE) -> T:
    """Return the first true value of `probe`; fail if there is none within `patience` seconds."""
    deadline, pause = time.monotonic() + patience, 0.001
    while not (found := probe()):
        assert time.monotonic() < deadline, f"still {found!r} after {patience} s"
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def get(port: int, path: str) -> tuple[int, str] | None:
    """Return the status and the text of an answer; None if nobody answers."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException):  # it may die in the middle of an answer
        return None
    finally:
        client.close()


def conninfo() -> str:
    """Return the connection string of the test database."""
    names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    database = connection.settings_dict
    return make_conninfo(**{name: database[key] for key, name in names.items() if database[key]})


def connect(**options: Any) -> psycopg.Connection[Any]:
    """Open a connection that is not Django's, by default in autocommit mode."""
    return psycopg.connect(conninfo(), **{"autocommit": True, **options})


def notifications(listener: psycopg.Connection[Any]) -> int:
    """Return how many notifications have arrived on a connection that LISTENs."""
    listener.execute("select 1")
    return sum(1 for _ in listener.notifies(timeout=0))


@contextmanager
def worker_thread(**options: Any) -> Iterator[Worker]:
    """Run a worker in a thread, with a connection of its own, until the end of the block.

    By default it polls once an hour, so it finds an event only after a notification. The block starts
    once the worker LISTENs.
    """
    ready = threading.Event()
    worker = Worker(**{"poll_interval": HOUR, "on_ready": lambda _: ready.set(), **options})
    errors: list[BaseException] = []

    def run() -> None:
        try:
            worker.run()
        except BaseException as error:
            errors.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        yield worker
    finally:
        worker.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert not errors, errors


def work(**options: Any) -> None:
    """Be a worker, in this thread, until nothing is ready."""
    Worker(**options).run(drain=True)


def elsewhere(function: Callable[[], T]) -> T:
    """Run a function in another thread, on connections of its own; return what it returns."""
    found: list[T] = []

    def run() -> None:
        try:
            found.append(function())
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    return found[0]


def sleeping_workers() -> int:
    """Return how many workers hold S: they sleep, or are about to."""
    with connection.cursor() as cursor:
        cursor.execute(
            "select count(*) from pg_locks where locktype = 'advisory' and classid = 7531002 and granted"
        )
        row = cursor.fetchone()
        return int(row[0]) if row else 0


def wait_until_asleep(count: int = 1) -> None:
    """Wait until exactly `count` workers sleep."""
    eventually(lambda: sleeping_workers() == count)


def is_asleep(pid: int) -> bool:
    """Return whether the backend `pid` is idle outside a transaction."""
    with connection.cursor() as cursor:
        cursor.execute("select state from pg_stat_activity where pid = %s", [pid])
        return bool(cursor.fetchone() == ("idle",))


def make_challenge(title: str = "One", *, using: str = "default", **fields: Any) -> Challenge:
    """Save a challenge that ends in the far future; its source emits one event."""
    dates = {"start_date": date(2026, 1, 1), "end_date": date(2999, 1, 1)}
    return Challenge.objects.using(using).create(title=title, **{**dates, **fields})


def note(event: Event) -> None:
    """A handler that writes to the ledger."""
    Handled.objects.create(key=event.key, handler="note")


def handled() -> list[str]:
    """Return the keys in the ledger, in order."""
    return list(Handled.objects.order_by("id").values_list("key", flat=True))


def status(key: str = "key") -> str:
    return OutboxEvent.objects.get(key=key).status


def statuses() -> dict[str, str]:
    return dict(OutboxEvent.objects.order_by("id").values_list("key", "status"))


def deliveries() -> dict[str, tuple[str, int]]:
    """Return the status and the attempts of each handler's delivery. For tests of a single event."""
    return {d.handler: (d.status, d.attempts) for d in Delivery.objects.all()}


def make_ready() -> None:
    """Make every postponed event ready, as a person does."""
    OutboxEvent.objects.filter(status="pending").update(available_at=None)


def make_due() -> None:
    """Make everything due that waits for its time."""
    past = timezone.now() - timedelta(minutes=1)
    OutboxEvent.objects.filter(status="pending", available_at__isnull=False).update(available_at=past)
    Delivery.objects.filter(status="pending").update(available_at=past)


def wait_until_done(count: int) -> None:
    """Wait until `count` events are done."""
    eventually(lambda: OutboxEvent.objects.filter(status="done").count() == count)


def wait_until_ended() -> None:
    """Wait until no event is pending or running."""
    eventually(lambda: not OutboxEvent.objects.filter(status__in=["pending", "running"]).exists())


class Clock:
    """A worker's clock, which stands still until a test sets `now`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Flags:
    """Two files: a handler of tests.probe creates `started`, and waits for `go`."""

    def __init__(self, folder: Path) -> None:
        self.started, self.go = folder / "started", folder / "go"

    @property
    def payload(self) -> dict[str, Any]:
        return {"started": str(self.started), "go": str(self.go)}

    def wait(self) -> int:
        """Wait until a handler has started; return its process. Call it once for each start."""
        pid = eventually(lambda: self.started.exists() and self.started.read_text())
        self.started.unlink()
        return int(pid)


def start_a_handler(flags: Flags, group: str = "probe") -> int:
    """Emit an event, and return the process that handles it now."""
    emit(group, "key", **flags.payload)
    return flags.wait()


class WorkerProcess:
    """A real `manage.py spark_worker`, with a socket where its messages to systemd arrive.

    `within` is a command that runs another one, such as `ip netns exec`.
    """

    def __init__(
        self,
        *arguments: str,
        url: str | None = None,
        within: Sequence[str] = (),
        stdin: int | None = subprocess.DEVNULL,
        **environment: str,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="spark")
        address = f"{self._folder.name}/notify"
        self._messages = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._messages.bind(address)
        self._unread: list[str] = []
        self.signs: list[str] = []
        """The signs of life that `message` and `has_message` have passed over."""
        self._output = Path(f"{self._folder.name}/output")
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [*within, sys.executable, settings.BASE_DIR / "manage.py", "spark_worker", *arguments],
                env=_environment(url, NOTIFY_SOCKET=address, PYTHONUNBUFFERED="1", **environment),
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._messages.close()
        self._folder.cleanup()

    @property
    def output(self) -> str:
        return self._output.read_text()

    def message(self) -> str:
        """Return the first line of the next message that the worker sends to systemd, but for signs of
        life."""
        eventually(self.has_message)
        return self._unread.pop(0)

    def has_message(self) -> bool:
        while select.select([self._messages], [], [], 0)[0]:
            text = self._messages.recv(1000).decode()
            kept = self.signs if text.startswith(("STATUS=", "WATCHDOG=")) else self._unread
            kept.append(text.partition("\n")[0])
            self.last = text
        return bool(self._unread)

    def status_line(self, part: str) -> str:
        """Wait for a status line that has this part; return it."""

        def found() -> str | None:
            self.has_message()
            lines = (sign for sign in self.signs if sign.startswith("STATUS="))
            return next((line for line in lines if part in line), None)

        return str(eventually(found))

    def wait_until_ready(self) -> "WorkerProcess":
        assert self.message() == "READY=1"
        return self

    def wait_until_it_says(self, expected: str) -> None:
        """Wait for a message of a worker with several processes, each of which may have sent READY=1."""
        while (message := self.message()) != expected:
            assert message == "READY=1"

    def kill(self) -> None:
        """kill -9 the supervisor and all of its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def owns(self, pid: int) -> bool:
        """Return whether `pid` is one of its children."""
        return os.getpgid(pid) == self.process.pid

    def children(self) -> list[int]:
        """Return the processes that the supervisor has started."""
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Return the exit code; a signal's number, negative, if one ended the process."""
        return self.process.wait(PATIENCE)


def _environment(url: str | None, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "DATABASE_URL": url or conninfo(),
        **more,
    }


def manage(
    *arguments: str, url: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run manage.py in a process of its own, on the test database."""
    return subprocess.run(
        [sys.executable, settings.BASE_DIR / "manage.py", *arguments],
        env=_environment(url, **environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
