"""Writers and workers in processes of their own, with several routes to one server."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from django.conf import settings

from tests import tools
from tests.chaos import pgbouncer
from tests.chaos.pgbouncer import PgBouncer
from tests.chaos.proxy import Proxy
from tests.chaos.server import Server
from tests.tools import eventually

WORKER = (settings.BASE_DIR / "manage.py", "spark_worker", "-v", "2", "--shutdown-timeout", "5")


class Member:
    """One process, which is restarted when it ends, as by systemd."""

    def __init__(
        self, name: str, command: tuple[object, ...], environment: dict[str, str], log: Path
    ) -> None:
        self.name = name
        self.environment = environment
        self.log = log
        self.exits: Counter[int] = Counter()
        self._command = command
        self._lock = threading.Lock()
        self._resting = False
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-X", "faulthandler", *map(str, self._command)]
        with self.log.open("a") as log:
            return subprocess.Popen(
                command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def look_after(self) -> None:
        """Restart it if it has ended."""
        with self._lock:
            if not self._resting and self.process.poll() is not None:
                self.exits[self.process.returncode] += 1
                self.process = self.start()

    def pids(self) -> list[int]:
        """Return its own process and its children."""
        own = self.process.pid
        children = ""
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{own}/task/{own}/children").read_text()
        return [own, *map(int, children.split())]

    def signal(self, pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill(self) -> None:
        """kill -9 the process and its children."""
        for pid in self.pids():
            self.signal(pid, signal.SIGKILL)

    def stop(self, patience: float) -> None:
        """Send SIGTERM, and don't restart it; kill -9 if it does not end within `patience` seconds."""
        with self._lock:
            self._resting = True
            self.process.terminate()
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.kill()
                self.process.wait()
            self.exits[self.process.returncode] += 1

    def restart(self, **environment: str) -> None:
        """Deploy: stop it, and start it with a changed environment."""
        self.stop(30)
        with self._lock:
            self.environment |= environment
            self._resting = False
            self.process = self.start()


class Rig:
    """Everything that runs. `random` makes all choices of the faults; `say` prints their names."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.say = say
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._closing = contextlib.ExitStack()
        self._ended = threading.Event()
        self.stuck = 0
        self.writers: list[Member] = []
        self.workers: list[Member] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.server = Server(self.folder, small_disk=True)
            stack.callback(self.server.remove)
            self._prepare()
            self.proxy = stack.enter_context(Proxy(self.server.url()))
            self.bouncer: PgBouncer | None = None
            if pgbouncer.PROGRAM:
                log = self.folder / "pgbouncer.log"
                self.bouncer = stack.enter_context(PgBouncer(self.server.url(), log=log))
            stack.callback(self._kill_all)
            self._start()
            keeper = threading.Thread(target=self._keep)
            keeper.start()
            stack.callback(keeper.join)
            stack.callback(self._ended.set)
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def members(self) -> list[Member]:
        return self.writers + self.workers

    def manage(self, *arguments: str) -> bool:
        """Run manage.py by the direct route; return whether it succeeded."""
        done = tools.manage(*arguments, **self._environment(self.server.url()))
        with (self.folder / "manage.log").open("a") as log:
            log.write(f"{arguments}\n{done.stdout}{done.stderr}\n")
        return done.returncode == 0

    def _prepare(self) -> None:
        self.files = self.folder / "files"
        self.files.mkdir()
        self.server.query("create role chaos login; grant create, usage on schema public to chaos")
        self.server.query("grant pg_signal_backend to chaos; grant create on database postgres to chaos")
        self.server.query("create role chaos_tenant; grant chaos_tenant to chaos")
        assert self.manage("migrate", "--run-syncdb", "--no-input"), (
            self.folder / "manage.log"
        ).read_text()
        self.server.query("insert into chaos_account (balance) values (0), (0)")

    def _environment(self, url: str, **more: str) -> dict[str, str]:
        return {
            "DJANGO_SETTINGS_MODULE": "tests.chaos.settings",
            "DATABASE_URL": url,
            "CHAOS_FILES": str(self.files),
            "CHAOS_DIRECT_URL": self.server.url(application_name="chaos_listener"),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(settings.BASE_DIR),
            **more,
        }

    def _start(self) -> None:
        """Start all members. Without pgbouncer, its clients connect directly.

        The members that are always direct have psycopg's pool in their settings.
        """
        direct, cut = self.server.url(), self.proxy.url
        pooled, listens, polls = direct, "own", "own"
        if self.bouncer is not None:
            pooled, listens, polls = self.bouncer.url, "direct", "poll"
        for name, url, pool in (("direct", direct, "yes"), ("cut", cut, ""), ("pooled", pooled, "")):
            command = ("-m", "tests.chaos.writer", f"writer-{name}")
            self._add(self.writers, f"writer-{name}", command, url, CHAOS_POOL=pool)
        self._add(
            self.workers,
            "worker-direct",
            (*WORKER, "--processes", "2", "--max-rss", "150"),
            direct,
            CHAOS_POOL="yes",
        )
        self._add(self.workers, "worker-cut", WORKER, cut, CHAOS_RELEASE="new")
        self._add(self.workers, "worker-pooled", WORKER, pooled, CHAOS_LISTEN=listens)
        self._add(
            self.workers,
            "worker-polls",
            (*WORKER, "--groups", "^(?!chaos_detached$)"),
            pooled,
            CHAOS_LISTEN=polls,
            CHAOS_RELEASE="new",
        )

    def _add(
        self, members: list[Member], name: str, command: tuple[object, ...], url: str, **more: str
    ) -> None:
        if members is self.writers:
            command = (*command, f"{self._seed} {name}")
        environment = self._environment(url, **more)
        members.append(Member(name, command, environment, self.folder / f"{name}.log"))

    def _keep(self) -> None:
        while not self._ended.wait(0.2):
            for member in self.members:
                member.look_after()

    def _kill_all(self) -> None:
        for member in self.members:
            member.kill()
            member.process.wait()

    # The run

    def run(self, faults: list[Callable[["Rig"], None]], seconds: float) -> None:
        """Inject each fault once, in random order, and repeat until the time is over."""
        eventually(
            lambda: self.server.query("select count(*) > 100 from chaos_effect")[0][0], patience=90
        )
        deadline = time.monotonic() + seconds
        rounds = 0
        while rounds == 0 or time.monotonic() < deadline:
            order = self.random.sample(faults, len(faults))
            for fault in order:
                if rounds and time.monotonic() >= deadline:
                    break
                self.counts[fault.__name__] += 1
                self.say(f"{fault.__name__}: {fault.__doc__}")
                fault(self)
                time.sleep(self.random.uniform(0, 1))
            rounds += 1

    def settle(self, patience: float) -> None:
        """Stop the writers, and wait for the workers; count the events that get stuck.

        First wait for the workers that LISTEN, without the one that polls: it would hide lost wakes.
        Then deploy the new release everywhere, for events that the old one has no handler for.
        """
        polls = self.workers[-1]
        for member in (*self.writers, polls):
            member.stop(30)
        self.stuck = self._wait_until_none_is("'pending', 'running'", patience)
        for worker in self.workers:
            worker.restart(CHAOS_RELEASE="new")
        self.stuck += self._wait_until_none_is("'pending', 'running', 'unhandled'", patience)
        for worker in self.workers:
            worker.stop(30)

    def _wait_until_none_is(self, statuses: str, patience: float) -> int:
        """Wait until no event has one of these statuses; return how many still have."""
        deadline = time.monotonic() + patience
        sql = f"select count(*) from spark_outbox_event where status in ({statuses})"
        while (left := self.server.query(sql)[0][0]) and time.monotonic() < deadline:
            time.sleep(0.2)
        return int(left)

    def tell(self, keys: list[str]) -> list[tuple[Any, ...]]:
        """Return all that the database has on the first nine of these keys."""
        sql = """
            select event.id, event.key, event.event_group, event.status, event.attempts,
                event.created_at, event.finished_at,
                delivery.handler, delivery.status, delivery.attempts, delivery.error
            from spark_outbox_event as event
            left join spark_outbox_delivery as delivery on delivery.event_id = event.id
            where event.key = any(%s)
        """
        return [
            *((key,) for key in keys[:9]),
            *self.server.query(sql, [[key.partition(" ")[0] for key in keys[:9]]]),
        ]

    def ends(self) -> Counter[str]:
        """Count how processes ended: the members, and the children of workers."""
        ends = Counter(
            f"{member.name.partition('-')[0]} ended with {code}"
            for member in self.members
            for code in member.exits.elements()
        )
        for worker in self.workers:
            ends.update(
                re.findall(
                    r"The worker process \d+ (died of .*?)\.$", worker.log.read_text(), re.MULTILINE
                )
            )
        return ends
