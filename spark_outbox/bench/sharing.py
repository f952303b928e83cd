"""Measures whether idle processes share the work, and whether events get theirs beside many others."""

import logging
import time
from typing import Any

from django.db import transaction

from spark_outbox.bench.figures import Bench, Figure, Goal, measure, percentile
from spark_outbox.bench.load import (
    child_workers,
    drain_with,
    fill,
    handlers,
    make_worker,
    pending,
    refill,
    sleeping,
    wait_until,
    write,
)
from spark_outbox.bench.resting import CROWD, asleep
from spark_outbox.bench.scratch import Scratch
from spark_outbox.bench.waking import emit_and_wait, moments
from spark_outbox.registry.handlers import Registry
from spark_outbox.registry.policy import Policy

RATE = "events/s"


def commit(scratch: Scratch, count: int, *, group: str = "bench") -> float:
    """Commit `count` events at once; return when."""
    with transaction.atomic(using=scratch.alias):
        write(scratch, count, group=group)
        return time.monotonic()


# Among processes

EVENTS = 800  # also with --quick: with fewer, batches are too large to be shared


@measure
def spread(bench: Bench) -> list[Figure]:
    """Events that come at once to eight idle processes, whose handler waits for 5 ms: the seconds until
    all are done, against an eighth of those that one process takes."""
    waiting = handlers(lambda _: time.sleep(0.005))

    def seconds(processes: int) -> float:
        refill(bench.scratch, 0)
        with asleep(bench.scratch, waiting, counts=[processes]):
            committed = commit(bench.scratch, EVENTS)
            wait_until(lambda: not pending(bench.scratch))
            return time.monotonic() - committed

    crowd, one = bench.medians(lambda: seconds(CROWD), lambda: seconds(1))
    return [Figure("spread", crowd, "s", one / CROWD, Goal("<=", 1.3))]


# Among groups

PACE = 20  # events a second that come one by one

IS_LEFT = """
select exists (
    select from spark_outbox_event
    where status = 'pending' and available_at is null and ordering_key is null and id > %s
)
"""


@measure
def groups(bench: Bench) -> list[Figure]:
    """A worker of one group, with many ready events of another before its own, against without them."""
    count, samples = bench.size(20_000), int(bench.seconds(20) * PACE)
    big = Scratch(bench.near, "_big")
    refill(bench.scratch, 0)
    big.create(template=bench.scratch)
    fill(big, bench.size(1_000_000), group="slow")
    rate, p50, free_rate, free_p50 = bench.medians(
        lambda: of_one_group(big, count, samples), lambda: of_one_group(bench.scratch, count, samples)
    )
    big.drop()
    return [
        Figure("groups", rate, RATE, free_rate, Goal(">=", 0.9)),
        Figure("groups_latency", p50, "ms", free_p50, Goal("<=", 1.5)),
    ]


def of_one_group(scratch: Scratch, count: int, samples: int) -> tuple[float, float]:
    """Return how many of `count` events a second a sleeping worker of their group handles, which come at
    once; and the p50 of the latency of others, one by one, in milliseconds.

    The worker is a daemon: with `drain` it would read all events of other groups at the end.
    """
    # The worker of the run before was killed, and that makes its successor handle events one by one.
    scratch.execute("delete from spark_outbox_session")
    with moments() as arrivals:

        def note_single(event: Any) -> None:
            if event.get("number") is None:  # not of those that `write` writes
                arrivals.note()

        registry = Registry()
        registry.add_handler(note_single, group="^fast", name="fast")
        with child_workers(scratch, registry, groups="^fast"):
            wait_until(lambda: sleeping(scratch))
            found = []
            for _ in range(samples):
                time.sleep(1 / PACE)
                found.append(emit_and_wait(scratch, arrivals, group="fast"))
            scratch.execute("vacuum analyze spark_outbox_event")  # or it comes when it likes
            last = scratch.execute("select max(id) from spark_outbox_event")
            committed = commit(scratch, count, group="fast")
            wait_until(lambda: not scratch.execute(IS_LEFT, [last]))
            seconds = time.monotonic() - committed
    return count / seconds, percentile(found, 0.5)


# Among ready events and retries

FAILED_ONCE = """
with failed as (
    insert into spark_outbox_event (key, event_group, attempts, available_at)
    select gen_random_uuid(), 'failing', 1, statement_timestamp() - interval '1 hour'
    from generate_series(1, %s)
    returning id, available_at
)
insert into spark_outbox_delivery (event_id, handler, attempts, available_at)
select id, 'failing', 1, available_at from failed
"""


@measure
def retries(bench: Bench) -> list[Figure]:
    """Ready events while many others are due and fail again, against what the time of these leaves; and
    the share of retries in all calls.

    The baseline takes as long as the ready events alone, and the same number of retries alone.
    """
    count, due = bench.size(20_000), bench.size(100_000)

    def beside_retries() -> tuple[float, float, float]:
        ready_alone, _ = until_done(bench, ready=count)
        retries_alone, number = until_done(bench, due=count)
        seconds, retried = until_done(bench, ready=count, due=due)
        expected = ready_alone + retried * retries_alone / number
        return count / seconds, count / expected, retried / (count + retried)

    logging.disable(logging.WARNING)
    rate, expected, share = bench.medians(beside_retries)
    logging.disable(logging.NOTSET)
    return [
        Figure("retries", rate, RATE, expected, Goal(">=", 0.8)),
        Figure("retries_share", share, "of calls"),
    ]


def until_done(bench: Bench, *, ready: int = 0, due: int = 0) -> tuple[float, int]:
    """Let a worker handle `ready` events beside `due` ones that fail again; if there are none, these.

    Return the seconds, and how many have failed until then. No circuit opens: a retry counts for none.
    """
    refill(bench.scratch, ready)
    bench.scratch.execute(FAILED_ONCE, [due])
    bench.scratch.execute("analyze spark_outbox_event, spark_outbox_delivery")
    handled = failed = 0

    def handle(_: object) -> None:
        nonlocal handled
        handled += 1
        if handled == ready:
            worker.stop()  # it commits this batch first

    def fail(_: object) -> None:
        nonlocal failed
        failed += 1
        raise ValueError

    registry = Registry()
    registry.add_handler(handle, group="^bench", name="handling")
    registry.add_handler(fail, group="^failing", name="failing", policy=Policy(backoff=[3600]))
    worker = make_worker(bench.scratch, registry)
    seconds = drain_with(worker, bench.scratch)
    if handled != ready or (not ready and failed != due):
        raise RuntimeError(f"Handled {handled} events of {ready}, and {failed} of {due} have failed.")
    return seconds, failed
