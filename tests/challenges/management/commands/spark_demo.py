"""The main job, on real input: save, emit, wake, handle; and then settle the books."""

import io
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connection, transaction
from django.db.models import Max
from django.test.utils import override_settings
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from spark_outbox import Event
from tests.challenges import serving
from tests.challenges.models import Challenge, Donation, Handled
from tests.challenges.sources import events_from_challenge, events_from_donation

PATIENCE = 60.0
"""Seconds without any progress after which events count as lost."""

LATENCIES = """
select
    percentile_cont(0.5) within group (order by milliseconds),
    percentile_cont(0.99) within group (order by milliseconds)
from (
    select extract(epoch from handled.handled_at - event.created_at)::float * 1000 as milliseconds
    from challenges_handled as handled
    join spark_outbox_event as event using (key)
    where handled.id > %s
) as latencies
"""


class Undo(Exception):
    pass


class Books:
    """What was emitted, by what became of its transaction."""

    def __init__(self) -> None:
        self.committed: set[str] = set()
        self.rolled_back: set[str] = set()
        self.duplicates = 0

    def commit(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.duplicates += key in self.committed
            self.committed.add(key)


class Command(BaseCommand):
    help = (
        "Starts a worker, saves challenges and donations in transactions, some of which roll back and "
        "some of which yield keys that exist already, and checks that everything that was committed "
        "was handled exactly once, and nothing else. With --serve it goes on until Ctrl-C, with events "
        "of which a few fail, and serves the admin and its dashboard to this machine."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--seconds", type=float, default=10.0, help="default: %(default)s")
        parser.add_argument(
            "--rate", type=float, help="transactions a second (default: 50; with --serve: 5)"
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument("--serve", action="store_true", help="serve the admin until Ctrl-C")
        parser.add_argument(
            "--port", type=int, help="of --serve; 0 is any (default: 8000, or any if that is taken)"
        )

    def handle(self, **options: Any) -> None:
        if options["rate"] is None:
            options["rate"] = 5.0 if options["serve"] else 50.0
        if options["seconds"] <= 0 or options["rate"] <= 0:
            raise CommandError("--seconds and --rate must be above 0.")
        call_command("migrate", verbosity=0)
        if options["serve"]:
            self._serve(options["rate"], options["port"])
            return
        # What earlier runs have left over is not this run's business.
        call_command("spark_worker", drain=True, stdout=io.StringIO())
        self.before = Handled.objects.aggregate(last=Max("id"))["last"] or 0
        books = Books()
        with running_worker(), self._progress(options) as progress:
            for saved in self._save_for(options["seconds"], options["rate"], books):
                progress(saved, books)
            self._await_handling(books, lambda: progress(1.0, books))
        result = self._settle(books)
        if options["json"]:
            self.stdout.write(json.dumps(result))
        else:
            self._print(result)
        self._judge(books)

    def _serve(self, rate: float, port: int | None) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has not said otherwise
                signal.signal(number, signal.default_int_handler)
        challenges: list[Challenge] = []
        with (
            suppress(KeyboardInterrupt),
            override_settings(SPARK_OUTBOX={"ENVIRONMENT": "demo"}),
            running_worker(),
            serving.admin(port) as url,
            serving.login() as (user, password),
        ):
            self.stdout.write(f"dashboard  {url}\n    login  {user}, password {password}\n")
            self.stdout.write("\nA few events fail: look at Triage, and retry them. Ctrl-C ends it all.")
            self.stdout.flush()
            for _ in serving.at_rate(rate):
                save_something(challenges, Books())
                serving.emit_something()
                del challenges[: -serving.KEPT]
        self.stdout.write("Ended.")

    def _save_for(self, seconds: float, rate: float, books: Books) -> Iterator[float]:
        """Run transactions at `rate` for so long; yield how much of the time is over."""
        start = time.monotonic()
        challenges: list[Challenge] = []
        for number in range(max(1, int(seconds * rate))):
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
            save_something(challenges, books)
            yield min(1.0, (time.monotonic() - start) / seconds)
            if time.monotonic() - start > seconds:
                return

    def _await_handling(self, books: Books, show: Any) -> None:
        """Wait until as much was handled as was committed; give up when nothing moves any more."""
        handled, deadline = -1, time.monotonic() + PATIENCE
        while handled < len(books.committed) and time.monotonic() < deadline:
            if (now := self._handled_since().count()) != handled:
                handled, deadline = now, time.monotonic() + PATIENCE
            show()
            time.sleep(0.02)

    def _handled_since(self) -> Any:
        return Handled.objects.filter(id__gt=self.before)

    def _settle(self, books: Books) -> dict[str, Any]:
        times = Counter(self._handled_since().values_list("key", flat=True))
        with connection.cursor() as cursor:
            cursor.execute(LATENCIES, [self.before])
            p50, p99 = cursor.fetchone() or (None, None)
            cursor.execute("show server_version")
            version = (cursor.fetchone() or [""])[0]
        return {
            "committed": len(books.committed),
            "rolled_back": len(books.rolled_back),
            "duplicates": books.duplicates,
            "handled": sum(key in books.committed for key in times),
            "lost": sum(key not in times for key in books.committed),
            "handled_twice": sum(count > 1 for count in times.values()),
            "latency_ms": {"p50": p50 and round(p50, 2), "p99": p99 and round(p99, 2)},
            "postgres": version,
        }

    def _judge(self, books: Books) -> None:
        times = Counter(self._handled_since().values_list("key", flat=True))
        wrong = [
            f"{len(keys)} {what}: {', '.join(sorted(keys)[:5])}"
            for what, keys in (
                ("committed and not handled", books.committed - set(times)),
                ("handled more than once", {key for key, count in times.items() if count > 1}),
                ("rolled back, but handled", books.rolled_back & set(times)),
            )
            if keys
        ]
        if wrong:
            raise CommandError("; ".join(wrong))

    def _print(self, result: dict[str, Any]) -> None:
        latency = result.pop("latency_ms")
        for name, value in result.items():
            self.stdout.write(f"{name.replace('_', ' '):>15}  {value}")
        self.stdout.write(
            f"{'latency':>15}  p50 {latency['p50']} ms, p99 {latency['p99']} ms, from emit to handler"
        )
        self.stdout.write("\nGo on:")
        for what, command in ways_on():
            self.stdout.write(f"  {what:<10} {command}")

    @contextmanager
    def _progress(self, options: dict[str, Any]) -> Iterator[Any]:
        """Show on a terminal what is emitted and what is handled."""
        console = Console(stderr=True)
        with Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as bars:
            emitted = bars.add_task("emitted", total=1.0, note="")
            handled = bars.add_task("handled", total=1.0, note="")
            last_look = 0.0

            def show(part: float, books: Books) -> None:
                nonlocal last_look
                if time.monotonic() - last_look < 0.1 and part < 1.0:
                    return
                last_look = time.monotonic()
                note = f"{len(books.committed)} events"
                count = self._handled_since().count()
                bars.update(emitted, completed=part, note=note)
                share = part * count / max(1, len(books.committed))
                bars.update(handled, completed=share, note=f"{count} events")

            yield show


def save_something(challenges: list[Challenge], books: Books) -> None:
    """Run one transaction of a kind chosen at random; enter in `books` what becomes of its events."""
    kind = random.choices(["challenge", "donation", "again", "undo"], [3, 4, 2, 1])[0]
    keys: list[str] = []
    try:
        with transaction.atomic():
            if kind == "challenge" or not challenges:
                ended = random.random() < 0.2
                challenge = Challenge.objects.create(
                    title=f"Challenge {random.randrange(10**6)}",
                    start_date=date.today() - timedelta(days=9),
                    end_date=date.today() + timedelta(days=-1 if ended else 9),
                )
                keys += keys_of(events_from_challenge(challenge))
                challenges.append(challenge)
            elif kind == "again":  # yields the keys that its first save yielded
                challenge = random.choice(challenges)
                challenge.save()
                keys += keys_of(events_from_challenge(challenge))
            else:
                donation = Donation.objects.create(
                    challenge=random.choice(challenges), amount=Decimal(random.randrange(1, 10**5)) / 100
                )
                keys += keys_of(events_from_donation(donation))
            if kind == "undo" and challenges:
                raise Undo
    except Undo:
        challenges[:] = [c for c in challenges if f"challenge_created_{c.pk}" not in keys]
        books.rolled_back.update(keys)
    else:
        books.commit(keys)


def keys_of(events: Iterable[Any]) -> list[str]:
    return [Event.of(event).key for event in events]


@contextmanager
def running_worker() -> Iterator[None]:
    """Run a real `manage.py spark_worker` until the end of the block; wait for its READY=1 first."""
    manage = Path(settings.BASE_DIR) / "manage.py"
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
    ):
        ready.bind(f"{folder}/notify")
        ready.settimeout(PATIENCE)
        worker = subprocess.Popen(
            [sys.executable, manage, "spark_worker", "--no-reload"],
            env={**os.environ, "DATABASE_URL": settings.SERVER.url, "NOTIFY_SOCKET": f"{folder}/notify"},
            stdout=sys.stderr,
            process_group=0,  # Ctrl-C is for this process, which stops it
        )
        try:
            while (message := ready.recv(1000)).startswith(b"STATUS="):
                pass
            if message != b"READY=1":
                raise CommandError("The worker did not become ready; see above.")
            yield
        finally:
            worker.send_signal(signal.SIGTERM)
            if worker.wait(PATIENCE):
                raise CommandError(f"The worker exited with {worker.returncode}.")


def ways_on() -> Iterator[tuple[str, str]]:
    yield "look", "python manage.py spark_demo --serve"
    yield "worker", "python manage.py spark_worker"
    yield "shell", "python manage.py shell"
    server = settings.SERVER
    psql = "psql" if server.binaries is None else shlex.quote(str(server.binaries / "psql"))
    yield "psql", f"{psql} {shlex.quote(server.url)}"
    if server.binaries is not None:
        pg_ctl = shlex.quote(str(server.binaries / "pg_ctl"))
        become = "runuser -u pgserver -- " if os.geteuid() == 0 else ""
        yield "stop it", f"{become}{pg_ctl} stop -D {shlex.quote(str(server.data))}"
