"""Measures whether a worker stays fast with a long backlog, an old snapshot, and bad events."""

import logging
import statistics
import threading
import time
from typing import Any

from django.db import connections, transaction

from spark_outbox.bench.figures import Bench, Figure, Goal, measure, percentile
from spark_outbox.bench.load import child_workers, fill, handlers, make_worker, noop, refill
from spark_outbox.bench.scratch import Scratch
from spark_outbox.bench.waking import fill_bare, moments
from spark_outbox.events.references import References

CLAIMS = 30


@measure
def backlog(bench: Bench) -> list[Figure]:
    """Claims with many pending and with many delayed rows, against claims with a thousand."""
    refill(bench.scratch, 0)
    small, big, delayed = (Scratch(bench.near, name) for name in ("_small", "_big", "_delayed"))
    for each in (small, big, delayed):
        each.create(template=bench.scratch)
        fill(each, 1000)
    fill(big, bench.size(1_000_000))
    fill(delayed, bench.size(1_000_000), delay=3600)
    for each in (small, big, delayed):
        each.execute("vacuum analyze spark_outbox_event")
    pending, later, baseline = bench.medians(
        lambda: claims_a_second(big), lambda: claims_a_second(delayed), lambda: claims_a_second(small)
    )
    for each in (small, big, delayed):
        each.drop()
    return [
        Figure("backlog_pending", pending, "claims/s", baseline, Goal(">=", 0.8)),
        Figure("backlog_delayed", later, "claims/s", baseline, Goal(">=", 0.8)),
    ]


def claims_a_second(scratch: Scratch) -> float:
    """Claim the first events again and again, as a sweep does, and roll back."""
    claims = make_worker(scratch, handlers(noop))._claims
    claims.size.fitting = 100
    found = []
    for _ in range(CLAIMS):
        with transaction.atomic(using=scratch.alias):
            started = time.perf_counter()
            batch = claims.next(References(), sweep=True)
            found.append(time.perf_counter() - started)
            transaction.set_rollback(True, using=scratch.alias)
        if not batch.events:
            raise RuntimeError("The claim found nothing.")
    return 1 / statistics.median(found)


@measure
def held_snapshot(bench: Bench) -> list[Figure]:
    """A steady load while another session holds an old snapshot, against the same load without it."""
    seconds, rate = bench.seconds(60), 1000

    def under_load(*, is_held: bool) -> tuple[float, float]:
        """Return events a second, and the milliseconds of a claim in the last sixth of the time."""
        refill(bench.scratch, 0)
        with bench.scratch.connect() as other, moments() as claims:

            def time_claims(execute: Any, sql: Any, *statement: Any) -> Any:
                started = time.perf_counter()
                found = execute(sql, *statement)
                if time.monotonic() >= since and "skip locked" in str(sql):
                    claims.tell(time.perf_counter() - started)
                return found

            since = time.monotonic() + seconds * 5 / 6  # the child reports only later claims
            if is_held:
                other.execute("begin isolation level repeatable read")
                other.execute("select count(*) from spark_outbox_event")
            with child_workers(bench.scratch, handlers(noop), watch=time_claims):
                emitter = threading.Thread(target=emit_steadily, args=[bench, rate, seconds])
                started = time.monotonic()
                emitter.start()
                time.sleep(max(0.0, since - started))
                found: list[float] = []
                while emitter.is_alive():
                    found += claims.all()  # so that the pipe never fills up and blocks the worker
                    time.sleep(0.02)
                took = time.monotonic() - started
                handled = count_done(bench)
            if is_held:
                other.execute("rollback")
        return handled / took, percentile(found, 0.5) * 1000

    held, claim, free, free_claim = bench.medians(
        lambda: under_load(is_held=True), lambda: under_load(is_held=False)
    )
    return [
        Figure("held_snapshot", held, "events/s", free, Goal(">=", 0.9)),
        Figure("held_snapshot_claim", claim, "ms", free_claim, Goal("<=", 1 / 0.9)),
    ]


def emit_steadily(bench: Bench, rate: int, seconds: float) -> None:
    try:
        started = time.monotonic()
        for number in range(int(seconds * 100)):
            fill_bare(bench, rate // 100)
            time.sleep(max(0.0, started + (number + 1) / 100 - time.monotonic()))
    finally:
        connections[bench.scratch.alias].close()


def count_done(bench: Bench) -> int:
    return int(bench.scratch.execute("select count(*) from spark_outbox_event where status = 'done'"))


@measure
def poison(bench: Bench) -> list[Figure]:
    """From commit to handler, at ten events a second: beside 300 that always fail, against without."""
    seconds = max(10.0, bench.seconds(40))
    many = bench.size(300)

    def p90(bad: int) -> float:
        refill(bench.scratch, 0)
        with moments() as arrivals:

            def fail_or_note(event: Any) -> None:
                if event.get("number") == 1:  # as `fill` writes them
                    raise ValueError
                arrivals.tell(time.time() - event.created_at.timestamp())

            with child_workers(bench.scratch, handlers(fail_or_note)):
                fill(bench.scratch, bad)
                count = int(seconds * 10)
                started = time.monotonic()
                for number in range(count):
                    fill_bare(bench, 1)
                    time.sleep(max(0.0, started + (number + 1) / 10 - time.monotonic()))
                found = [arrivals.next() for _ in range(count)]
        return percentile(found, 0.9) * 1000

    logging.disable(logging.WARNING)
    beside, alone = bench.medians(lambda: p90(many), lambda: p90(0))
    logging.disable(logging.NOTSET)
    return [Figure("poison_p90", beside, "ms", alone, Goal("<=", 2))]
