"""Shared by the measurements: many events, workers, and the bare loop to compare them with."""

import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from django.db import connections

from spark_outbox import conf
from spark_outbox.bench.scratch import Scratch
from spark_outbox.processes.guard import Guard
from spark_outbox.processes.slot import Slot
from spark_outbox.registry.handlers import Registry
from spark_outbox.store import claiming
from spark_outbox.worker.loop import Worker

FILL = """
insert into spark_outbox_event
    (key, event_group, payload, ordering_key, status, available_at, finished_at)
select gen_random_uuid(), %(group)s, '{"number": 1}', %(ordering_key)s, %(status)s,
    statement_timestamp() + %(delay)s * interval '1 second', case when %(status)s = 'done' then now() end
from generate_series(1, %(count)s)
"""

EMPTY = """
truncate spark_outbox_event, spark_outbox_delivery, spark_outbox_session, spark_bench_row
restart identity
"""


PROC = Path("/proc")
"""The folder in which Linux describes its processes."""


def process_fields(pid: int) -> list[str]:
    """Return the fields of a process after its name: its state, its parent, …"""
    return PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()


def noop(event: Any) -> None:
    """A handler that does nothing."""


def handlers(*functions: Callable[..., object], **options: Any) -> Registry:
    registry = Registry()
    for number, function in enumerate(functions):
        registry.add_handler(function, group="^bench", name=f"bench {number}", **options)
    return registry


def write(
    scratch: Scratch,
    count: int,
    *,
    group: str = "bench",
    status: str = "pending",
    ordering_key: str | None = None,
    delay: float | None = None,
) -> None:
    """Write `count` events in one statement."""
    params = {"count": count, "group": group, "status": status, "delay": delay}
    scratch.execute(FILL, {**params, "ordering_key": ordering_key})


def fill(scratch: Scratch, count: int, **options: Any) -> None:
    """Write `count` events in one statement, and let the planner know of them."""
    write(scratch, count, **options)
    scratch.execute("analyze spark_outbox_event")


def refill(scratch: Scratch, count: int, **options: Any) -> None:
    scratch.execute(EMPTY)
    fill(scratch, count, **options)


def pending(scratch: Scratch) -> int:
    return int(scratch.execute("select count(*) from spark_outbox_event where status = 'pending'"))


def make_worker(scratch: Scratch, registry: Registry, **options: Any) -> Worker:
    """Return a worker with the same arguments as one of `spark_worker`."""
    return Worker(using=scratch.alias, registry=registry, guard=Guard(Slot(0)), **options)


def drain(scratch: Scratch, registry: Registry, count: int) -> float:
    """Let a worker in this process handle all events; return events a second."""
    seconds = drain_with(make_worker(scratch, registry), scratch)
    if left := pending(scratch):
        raise RuntimeError(f"{left} events of {count} are left.")
    return count / seconds


def drain_with(worker: Worker, scratch: Scratch) -> float:
    """Let a worker in this process handle all events, or stop before; return the seconds."""
    connections[scratch.alias].ensure_connection()
    gc.collect()
    gc.freeze()  # as spark_worker does
    started = time.perf_counter()
    worker.run(drain=True)
    seconds = time.perf_counter() - started
    gc.unfreeze()
    return seconds


BARE_UPDATE = """
update spark_outbox_event
set status = 'done', attempts = attempts + 1, finished_at = statement_timestamp()
where id = any(%s) and status = 'pending'
"""


def bare_drain(scratch: Scratch, count: int) -> float:
    """Run the statements of a worker with psycopg alone; return events a second."""
    claim = claiming.CLAIM_READY
    limit = conf.current().BATCH_SIZE
    floor = handled = 0
    with scratch.connect() as connection:
        started = time.perf_counter()
        while True:
            with connection.transaction():
                rows = connection.execute(claim, {"floor": floor, "limit": limit}).fetchall()
                if not rows:
                    break
                ids = [row[0] for row in rows]
                connection.execute(BARE_UPDATE, [ids])
            floor = ids[-1] + 1
            handled += len(ids)
        seconds = time.perf_counter() - started
    if handled != count:
        raise RuntimeError(f"The bare loop handled {handled} events of {count}.")
    return count / seconds


class Child:
    """A process of its own that runs a function."""

    def __init__(self, function: Callable[[], None]) -> None:
        connections.close_all()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            function()
            code = 0
        finally:
            os._exit(code)

    def kill(self) -> None:
        """kill -9, and wait."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


@contextlib.contextmanager
def child_workers(
    scratch: Scratch,
    registry: Registry,
    *,
    count: int = 1,
    watch: Callable[..., Any] | None = None,
    **options: Any,
) -> Iterator[list[Child]]:
    """Run workers in processes of their own until the end of the block, which starts once they LISTEN.

    `watch` is wrapped around each of their statements, as by Django's `execute_wrapper`.
    """
    ready, say_ready = os.pipe()

    def work() -> None:
        if watch is not None:
            connections[scratch.alias].execute_wrappers.append(watch)
        worker = make_worker(scratch, registry, on_ready=lambda _: os.write(say_ready, b"r"), **options)
        worker.run()

    children = [Child(work) for _ in range(count)]
    try:
        for _ in children:
            os.read(ready, 1)
        yield children
    finally:
        for child in children:
            child.kill()
        os.close(ready)
        os.close(say_ready)


def sleeping(scratch: Scratch) -> bool:
    """Return whether a worker sleeps."""
    return bool(
        scratch.execute(
            "select exists (select from pg_locks where locktype = 'advisory' and classid = 7531002 "
            "and database = (select oid from pg_database where datname = current_database()))"
        )
    )


def wait_until(probe: Callable[[], bool], *, patience: float = 120.0) -> None:
    """Wait until `probe` is true. Raises TimeoutError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not probe():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Not so after {patience} s.")
        time.sleep(0.002)
