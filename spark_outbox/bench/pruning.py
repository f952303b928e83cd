"""Measures how fast ended events are pruned, beside many keys that are kept and events that flow."""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from django.db import ProgrammingError

from spark_outbox.bench.figures import Bench, Figure, Goal, measure, percentile
from spark_outbox.bench.load import EMPTY, Child, child_workers, handlers
from spark_outbox.bench.waking import moments
from spark_outbox.operating import prune as by_hand
from spark_outbox.store.pruning import Pruned
from spark_outbox.worker.retention import Portion

FLOW = 500
"""Events a second that are emitted and handled meanwhile."""

OLD_EVENTS = Portion("done", "order_paid", 14 * 86_400.0)

WRITE_KEPT_KEYS = """
insert into spark_outbox_event (key, event_group, status, created_at, finished_at, digest)
select 'order_placed_' || number, 'order_placed', 'done', now() - interval '90 days',
    now() - interval '90 days', number
from generate_series(1, %s) as number
"""

WRITE_OLD_EVENTS = """
insert into spark_outbox_event (key, event_group, payload, status, attempts, created_at, finished_at)
select gen_random_uuid(), 'order_paid', '{"order": 12345, "total": "12.50", "items": [1, 2, 3]}',
    'done', 1, now() - interval '30 days', now() - interval '30 days' + number * interval '1 ms'
from generate_series(1, %s) as number
"""

EMIT = "insert into spark_outbox_event (key, event_group) values (gen_random_uuid()::text, 'bench')"

SIZE = "select pg_total_relation_size('spark_outbox_event')"


@measure
def prune(bench: Bench) -> list[Figure]:
    """How many events are pruned in a second beside millions of kept keys, while others flow, against no
    kept keys; and what those that flow notice of it. Also the bytes of a kept key."""
    rate_alone, _ = with_rows(bench, 0, partial(flow, bench, prunes=True))
    kept = bench.size(5_000_000)
    rate, p99, _, p99_without = with_rows(
        bench, kept, partial(flow, bench, prunes=True), partial(flow, bench, prunes=False)
    )
    bench.scratch.execute(EMPTY)
    bench.scratch.execute(WRITE_KEPT_KEYS, [kept])
    size = int(bench.scratch.execute(SIZE))
    bench.scratch.execute(EMPTY)
    return [
        Figure("prune", rate, "events/s", rate_alone, Goal(">=", 0.8)),
        Figure("prune_latency_p99", p99, "ms", p99_without, Goal("<=", 2)),
        Figure("prune_kept_key", size / kept, "bytes"),
    ]


def with_rows(bench: Bench, kept: int, *runs: Callable[[], tuple[float, ...]]) -> list[float]:
    """Return the medians of `runs` in a table with so many kept keys, and a million old events."""
    scratch = bench.scratch
    scratch.execute(EMPTY)
    scratch.execute(WRITE_KEPT_KEYS, [kept])
    scratch.execute(WRITE_OLD_EVENTS, [bench.size(1_000_000)])
    scratch.execute("vacuum analyze spark_outbox_event")
    # A role without the right to it: what was written is written out later.
    with contextlib.suppress(ProgrammingError):
        scratch.execute("checkpoint")
    return bench.medians(*runs)


def flow(bench: Bench, *, prunes: bool) -> tuple[float, float]:
    """Emit events for a while; return how many others are pruned in a second, and the p99 of the latency
    in milliseconds."""
    seconds = bench.seconds(3)  # in all rounds together, less than a million events can be pruned
    latencies: list[float] = []
    with moments() as arrivals, moments() as rates:

        def arrive(event: Any) -> None:
            arrivals.tell(time.time() - event.created_at.timestamp())

        def prune_old() -> None:
            started, count = time.monotonic(), 0
            for each in by_hand.prune([OLD_EVENTS], using=bench.scratch.alias):
                count += each.total if isinstance(each, Pruned) else 0
                if time.monotonic() >= started + seconds:
                    break
            rates.tell(count / (time.monotonic() - started))

        with child_workers(bench.scratch, handlers(arrive)), bench.scratch.connect() as connection:
            child = Child(prune_old) if prunes else None
            start = time.monotonic()
            for number in range(int(seconds * FLOW)):
                time.sleep(max(0.0, start + number / FLOW - time.monotonic()))
                connection.execute(EMIT)
                latencies += arrivals.all()
            rate = rates.next() if child else 0.0
            if child:
                child.kill()
            time.sleep(0.1)
        latencies += arrivals.all()
    return rate, percentile(latencies, 0.99) * 1000
