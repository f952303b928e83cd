"""Measures the cost of waking for many writers beside idle processes, and how often they notify."""

import os
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from uuid import uuid4

from spark_outbox.bench.emitting import INSERT, POLL
from spark_outbox.bench.figures import Bench, Figure, Goal, measure
from spark_outbox.bench.load import Child, handlers, noop, refill
from spark_outbox.bench.resting import CROWD, asleep, supervised
from spark_outbox.store import waking

WRITERS = 16

LEAST = 8_000
"""Transactions, also with --quick: with fewer, the first moments count for too much."""

PACE = 50
"""Transactions a second of each writer that does not hurry."""

BUSINESS = "insert into spark_bench_row (key) values (%s)"


@measure
def emit_crowd(bench: Bench) -> list[Figure]:
    """Many writers beside eight idle processes, against no process and no trigger; and against one that
    polls, and so handles the events as well: the rest of the difference is the cost of waking."""
    count = max(LEAST, bench.size(40_000))
    worker = handlers(noop)

    def beside(service: AbstractContextManager[object], mode: str = "never") -> float:
        refill(bench.scratch, 0)
        waking.set_wake_mode(mode, using=bench.scratch.alias)
        with service:
            rate = count / write_at_once(bench, count)
        waking.set_wake_mode("gated", using=bench.scratch.alias)
        return rate

    crowd, none, polling = bench.medians(
        lambda: beside(asleep(bench.scratch, worker, counts=[CROWD]), "gated"),
        lambda: beside(nullcontext()),
        lambda: beside(supervised(bench.scratch, worker, processes=1, poll_interval=POLL)),
    )
    unit = "transactions/s"
    return [
        Figure("emit_crowd", crowd, unit, none, Goal(">=", 0.9)),
        Figure("emit_crowd_polled", crowd, unit, polling, Goal(">=", 0.9)),
    ]


@measure
def notify_share(bench: Bench) -> list[Figure]:
    """The share of commits that notify, beside eight idle processes: of many writers as fast as they
    can, and of as many at 50 transactions a second each."""
    count = max(LEAST, bench.size(40_000))
    full, paced = bench.medians(
        lambda: share(bench, count),
        lambda: share(bench, int(bench.seconds(10) * PACE * WRITERS), pause=1 / PACE),
    )
    return [
        Figure("notify_share", full, "of commits", goal=Goal("<", 0.01)),
        Figure("notify_share_paced", paced, "of commits", goal=Goal("<", 0.05)),
    ]


def share(bench: Bench, count: int, *, pause: float = 0) -> float:
    """Return the share of so many commits that has notified.

    A listener gets one notification of each such commit. It holds no S, so no trigger sees it.
    """
    refill(bench.scratch, 0)
    with (
        asleep(bench.scratch, handlers(noop), counts=[CROWD]),
        bench.scratch.connect() as listener,
    ):
        listener.execute(waking.LISTEN)
        write_at_once(bench, count, pause=pause)
        notified = 0
        while more := sum(1 for _ in listener.notifies(timeout=0.5)):
            notified += more
    return notified / count


def write_at_once(bench: Bench, count: int, *, pause: float = 0) -> float:
    """Let clients commit so many transactions in all, each client one every `pause` seconds; return the
    seconds that it took."""
    each = count // WRITERS
    ready, say_ready = os.pipe()
    go, say_go = os.pipe()

    def write(number: int) -> None:
        os.close(say_go)
        with bench.scratch.connect() as connection:
            os.write(say_ready, b"r")
            os.read(go, 1)  # until all other ends are closed
            due = time.monotonic() + pause * number / WRITERS
            for _ in range(each):
                time.sleep(max(0.0, due - time.monotonic()))
                with connection.transaction():
                    connection.execute(BUSINESS, ["business"])
                    connection.execute(INSERT, [str(uuid4()), "bench", "{}", "{}"])
                due += pause

    writers = [Child(partial(write, number)) for number in range(WRITERS)]
    for _ in writers:
        os.read(ready, 1)
    started = time.perf_counter()
    os.close(say_go)
    for writer in writers:
        os.waitpid(writer.pid, 0)
    seconds = time.perf_counter() - started
    for descriptor in (ready, say_ready, go):
        os.close(descriptor)
    return seconds
