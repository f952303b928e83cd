"""Measures how fast workers handle a full table: alone, with writing handlers, in order, in parallel."""

import os
import time
from collections.abc import Callable
from typing import Any

from django.db import transaction

from spark_outbox.bench.figures import Bench, Figure, Goal, measure
from spark_outbox.bench.load import (
    PROC,
    bare_drain,
    child_workers,
    drain,
    fill,
    handlers,
    noop,
    pending,
    refill,
    wait_until,
)
from spark_outbox.bench.scratch import BenchRow, Scratch
from spark_outbox.worker.savepoints import MAX_SUBTRANSACTIONS

RATE = "events/s"


def ours(bench: Bench, count: int, *functions: Callable[..., object], **options: Any) -> float:
    refill(bench.scratch, count, **options)
    return drain(bench.scratch, handlers(*functions), count)


@measure
def drain_noop(bench: Bench) -> list[Figure]:
    """One worker and a handler that does nothing, against the same statements without Python."""
    count = bench.size(40_000)

    def bare() -> float:
        refill(bench.scratch, count)
        return bare_drain(bench.scratch, count)

    rate, baseline = bench.medians(lambda: ours(bench, count, noop), bare)
    return [Figure("drain_noop", rate, RATE, baseline, Goal(">=", 0.75))]


@measure
def drain_orm(bench: Bench) -> list[Figure]:
    """A handler that creates a row, isolated from others, against a bare loop of creates."""
    count = bench.size(10_000)
    rows = BenchRow.objects.using(bench.scratch.alias)

    def create(event: Any) -> None:
        rows.create(key=event.key)

    def bare() -> float:
        refill(bench.scratch, 1)
        started = time.perf_counter()
        for first in range(0, count, MAX_SUBTRANSACTIONS):
            with transaction.atomic(using=bench.scratch.alias):
                for number in range(first, min(first + MAX_SUBTRANSACTIONS, count)):
                    rows.create(key=f"key {number}")
        return count / (time.perf_counter() - started)

    rate, baseline = bench.medians(lambda: ours(bench, count, create), bare)
    return [Figure("drain_orm", rate, RATE, baseline, Goal(">=", 0.65))]


@measure
def drain_two_handlers(bench: Bench) -> list[Figure]:
    """Two handlers for each event, against one."""
    count = bench.size(40_000)
    rate, baseline = bench.medians(
        lambda: ours(bench, count, noop, noop), lambda: ours(bench, count, noop)
    )
    return [Figure("drain_two_handlers", rate, RATE, baseline, Goal(">=", 0.85))]


@measure
def ordering(bench: Bench) -> list[Figure]:
    """Events that share one ordering key, against events without."""
    count = bench.size(20_000)
    rate, baseline = bench.medians(
        lambda: ours(bench, count, noop, ordering_key="hot"), lambda: ours(bench, count, noop)
    )
    return [Figure("ordering", rate, RATE, baseline, Goal(">=", 0.3))]


@measure
def history(bench: Bench) -> list[Figure]:
    """A table in which many events are done, against one that is empty."""
    count = bench.size(40_000)
    big = Scratch(bench.near, "_big")
    refill(bench.scratch, 0)
    big.create(template=bench.scratch)
    fill(big, bench.size(1_000_000), status="done")
    big.execute("vacuum analyze spark_outbox_event")

    def with_history() -> float:
        fill(big, count)
        return drain(big, handlers(noop), count)

    rate, baseline = bench.medians(with_history, lambda: ours(bench, count, noop))
    big.drop()
    return [Figure("history", rate, RATE, baseline, Goal(">=", 0.9))]


@measure
def processes(bench: Bench) -> list[Figure]:
    """Four processes and a handler that waits for 5 ms, against one."""
    count = bench.size(4_000)
    waiting = handlers(lambda _: time.sleep(0.005))

    def with_processes(number: int) -> float:
        refill(bench.scratch, 0)
        with child_workers(bench.scratch, waiting, count=number):
            fill(bench.scratch, count)
            started = time.perf_counter()
            bench.scratch.execute("notify spark_outbox")
            wait_until(lambda: not pending(bench.scratch))
            return count / (time.perf_counter() - started)

    rate, baseline = bench.medians(lambda: with_processes(4), lambda: with_processes(1))
    return [Figure("processes", rate, RATE, baseline, Goal(">=", 3.6))]


@measure
def memory(bench: Bench) -> list[Figure]:
    """The growth of a worker's memory while it handles ten times as many events."""
    if not PROC.exists():
        return []  # only Linux reports the memory in use now
    first, last = bench.size(20_000), bench.size(200_000)

    def growth() -> float:
        refill(bench.scratch, last)
        read, write = os.pipe()
        handled = 0

        def count(_: object) -> None:
            nonlocal handled
            handled += 1
            if handled in {first, last}:
                os.write(write, b"%020d" % resident())

        with child_workers(bench.scratch, handlers(count)):
            before, after = int(os.read(read, 20)), int(os.read(read, 20))
        os.close(read)
        os.close(write)
        return (after - before) / 1e6

    (megabytes,) = bench.medians(growth)
    return [Figure("memory", megabytes, "MB", goal=Goal("<", 3))]


def resident() -> int:
    """Return the bytes of memory that this process has in use."""
    with PROC.joinpath("self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
