"""Measures how soon a worker gets an event, and the cost of a worker that has none."""

import os
import select
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connections

from spark_outbox import conf, emit
from spark_outbox.bench.figures import Bench, Figure, Goal, measure, percentile
from spark_outbox.bench.load import (
    BARE_UPDATE,
    PROC,
    Child,
    child_workers,
    drain,
    fill,
    handlers,
    noop,
    process_fields,
    refill,
    sleeping,
    wait_until,
)
from spark_outbox.bench.scratch import Scratch
from spark_outbox.store import claiming, waking

NOW = struct.Struct("d")


class Moments:
    """Numbers, such as times, that a child process writes for its parent. Both use the same clock."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def note(self, *_: object) -> None:
        """Write the current time."""
        self.tell(time.monotonic())

    def tell(self, seconds: float) -> None:
        os.write(self._write, NOW.pack(seconds))

    def next(self, patience: float = 60.0) -> float:
        """Return the next number. Raises TimeoutError."""
        if not self._has_more(patience):
            raise TimeoutError(f"No event in {patience} s.")
        number: float = NOW.unpack(os.read(self._read, NOW.size))[0]
        return number

    def all(self) -> list[float]:
        """Return all numbers that have not been read yet."""
        found = []
        while self._has_more(0):
            found.append(self.next())
        return found

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)

    def _has_more(self, patience: float) -> bool:
        return bool(select.select([self._read], [], [], patience)[0])


@contextmanager
def moments() -> Iterator[Moments]:
    made = Moments()
    try:
        yield made
    finally:
        made.close()


@measure
def latency(bench: Bench) -> list[Figure]:
    """From commit to handler on an idle worker, against a bare loop that LISTENs and claims."""
    count = bench.size(400)

    def emit_slowly(arrivals: Moments) -> tuple[float, float]:
        """Commit 20 events a second; return p50 and p99 of their latency in milliseconds."""
        found = []
        for _ in range(count):
            time.sleep(0.05)
            found.append(emit_and_wait(bench.scratch, arrivals))
        return percentile(found, 0.5), percentile(found, 0.99)

    def ours() -> tuple[float, float]:
        refill(bench.scratch, 0)
        with moments() as arrivals, child_workers(bench.scratch, handlers(arrivals.note)):
            return emit_slowly(arrivals)

    def bare() -> tuple[float, float]:
        refill(bench.scratch, 0)
        with moments() as arrivals, bare_loop(bench, arrivals):
            return emit_slowly(arrivals)

    p50, p99, bare50, bare99 = bench.medians(ours, bare)
    return [
        Figure("latency_p50", p50, "ms", bare50, Goal("<=", 1.5)),
        Figure("latency_p99", p99, "ms", bare99, Goal("<=", 3)),
    ]


def emit_and_wait(scratch: Scratch, arrivals: Moments, *, group: str = "bench") -> float:
    """Emit an event; return the milliseconds from its commit until it arrives."""
    connection = connections[scratch.alias]
    connection.set_autocommit(False)
    emit(group, using=scratch.alias)
    committed = time.monotonic()
    connection.commit()
    connection.set_autocommit(True)
    return (arrivals.next() - committed) * 1000


@contextmanager
def bare_loop(bench: Bench, arrivals: Moments) -> Iterator[Child]:
    """Run a bare loop that LISTENs and claims, in a process of its own, until the end of the block."""
    waking.set_wake_mode("always", using=bench.scratch.alias)
    ready, say_ready = os.pipe()
    child = Child(lambda: listen_and_claim(bench, arrivals, say_ready))
    os.read(ready, 1)
    try:
        yield child
    finally:
        child.kill()
        os.close(ready)
        os.close(say_ready)
        waking.set_wake_mode("gated", using=bench.scratch.alias)


def listen_and_claim(bench: Bench, arrivals: Moments, say_ready: int) -> None:
    claim = claiming.CLAIM_READY
    floor = 0
    with bench.scratch.connect() as connection:
        connection.execute("listen spark_outbox")
        os.write(say_ready, b"r")
        while True:
            for _ in connection.notifies(stop_after=1):
                pass
            with connection.transaction():
                rows = connection.execute(claim, {"floor": floor, "limit": 500}).fetchall()
                for _ in rows:
                    arrivals.note()
                if rows:
                    floor = rows[-1][0] + 1
                    connection.execute(BARE_UPDATE, [[row[0] for row in rows]])


@measure
def latency_loaded(bench: Bench) -> list[Figure]:
    """From commit to handler while events come at half the rate that a worker can handle."""
    size, interval = bench.size(40_000), conf.current().COMMIT_INTERVAL
    refill(bench.scratch, size)
    rate = drain(bench.scratch, handlers(noop), size) / 2
    tick = 0.01
    ticks = int(bench.seconds(10) / tick)

    def p99() -> float:
        refill(bench.scratch, 0)
        with moments() as arrivals:
            count = 0

            def note_some(event: Any) -> None:
                nonlocal count
                count += 1
                if count % 20 == 0:
                    arrivals.tell(time.time() - event.created_at.timestamp())

            found: list[float] = []
            with child_workers(bench.scratch, handlers(note_some)):
                emitted, started = 0, time.monotonic()
                for number in range(ticks):
                    due = int((number + 1) * tick * rate)
                    fill_bare(bench, due - emitted)
                    emitted = due
                    found += arrivals.all()  # so that the pipe never blocks the worker
                    time.sleep(max(0.0, started + (number + 1) * tick - time.monotonic()))
                found += [arrivals.next() for _ in range(emitted // 20 - len(found))]
        return percentile(found, 0.99) * 1000

    (milliseconds,) = bench.medians(p99)
    return [Figure("latency_loaded", milliseconds, "ms", goal=Goal("<=", 5000 * interval))]


def fill_bare(bench: Bench, count: int) -> None:
    bench.scratch.execute(
        "insert into spark_outbox_event (key, event_group) "
        "select gen_random_uuid(), 'bench' from generate_series(1, %s)",
        [count],
    )


@measure
def takeover(bench: Bench) -> list[Figure]:
    """From kill -9 of a worker in the middle of a batch until another handles its events."""

    def seconds() -> float:
        refill(bench.scratch, 0)
        with moments() as started, moments() as handled:

            def hold(_: object) -> None:
                started.note()
                time.sleep(3600)

            with child_workers(bench.scratch, handlers(hold)) as (victim,):
                fill(bench.scratch, 10)
                bench.scratch.execute("notify spark_outbox")
                started.next()
                with child_workers(bench.scratch, handlers(handled.note)):
                    wait_until(lambda: sleeping(bench.scratch))
                    killed = time.monotonic()
                    victim.kill()
                    return handled.next() - killed

    (value,) = bench.medians(seconds)
    return [Figure("takeover", value, "s", goal=Goal("<", 1))]


@measure
def idle(bench: Bench) -> list[Figure]:
    """The statements and the processor time of a sleeping worker in a minute."""
    seconds, poll_interval = bench.seconds(30), bench.seconds(5)

    def asleep() -> tuple[float, float]:
        refill(bench.scratch, 0)
        read, write = os.pipe()

        def count(execute: Any, *statement: Any) -> Any:
            os.write(write, b".")
            return execute(*statement)

        with child_workers(bench.scratch, handlers(noop), poll_interval=poll_interval, watch=count) as (
            child,
        ):
            wait_until(lambda: sleeping(bench.scratch))
            time.sleep(0.5)
            os.read(read, 65_536)
            used = processor_seconds(child.pid)
            time.sleep(seconds)
            os.write(write, b".")
            statements = len(os.read(read, 65_536)) - 1
            processor = processor_seconds(child.pid) - used
        os.close(read)
        os.close(write)
        return statements / seconds * 60, processor / seconds * 60

    rate, processor = bench.medians(asleep)
    figures = [Figure("idle_statements", rate, "per minute", goal=Goal("<=", 60 / poll_interval + 2))]
    if PROC.exists():
        figures.append(Figure("idle_processor", processor, "s per minute", goal=Goal("<", 0.1)))
    return figures


def processor_seconds(pid: int) -> float:
    """Return the seconds of processor time that a process has used; 0 if the system has no /proc."""
    if not PROC.exists():
        return 0.0
    fields = process_fields(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
