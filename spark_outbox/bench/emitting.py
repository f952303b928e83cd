"""Measures the cost of emitting."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from django.db import connections, transaction

import spark_outbox
from spark_outbox.bench.figures import Bench, Figure, Goal, measure
from spark_outbox.bench.load import child_workers, handlers, noop, refill
from spark_outbox.bench.scratch import BenchRow, Scratch
from spark_outbox.events.encoding import dump
from spark_outbox.store import waking

CONNECTIONS = 64

POLL = 0.005
"""Seconds between two looks of a worker that nothing wakes."""

INSERT = """
insert into spark_outbox_event (key, event_group, payload, headers) values (%s, %s, %s::jsonb, %s::jsonb)
"""

INSERT_MANY = """
insert into spark_outbox_event (key, event_group, payload, headers)
select key, event_group, payload, headers
from unnest(%s::text[], %s::text[], %s::jsonb[], %s::jsonb[]) as new (key, event_group, payload, headers)
"""

# Transactions without a client's cost: a loop in the server, with a commit for each.
TRANSACTIONS = """
do $$ begin
    for number in 1..%(count)s loop
        insert into spark_bench_row (key) values ('business');
        insert into spark_outbox_event (key, event_group) values (gen_random_uuid()::text, 'bench');
        commit;
    end loop;
end $$
"""


@measure
def emit_one(bench: Bench) -> list[Figure]:
    """emit() next to a business row, against a bare INSERT of the same row."""
    count = bench.size(4_000)
    alias = bench.scratch.alias
    rows = BenchRow.objects.using(alias)

    def timed(write: Callable[[str, BenchRow], object]) -> float:
        refill(bench.scratch, 0)
        started = time.perf_counter()
        for number in range(count):
            with transaction.atomic(using=alias):
                write(f"key {number}", rows.create(key="business"))
        return count / (time.perf_counter() - started)

    def bare(key: str, row: BenchRow) -> None:
        payload = f'{{"row": {{"$": ["model", "spark_outbox.benchrow", {row.pk}, "{alias}"]}}}}'
        with connections[alias].cursor() as cursor:
            cursor.execute(INSERT, [key, "bench", payload, "{}"])

    rate, baseline = bench.medians(
        lambda: timed(lambda key, row: spark_outbox.emit("bench", key, row=row, using=alias)),
        lambda: timed(bare),
    )
    return [Figure("emit_one", rate, "transactions/s", baseline, Goal(">=", 0.85))]


@measure
def emit_many(bench: Bench) -> list[Figure]:
    """emit_many() of dicts with a model instance each, and of dicts with a few plain values, against one
    INSERT of prepared rows."""
    count = bench.size(20_000)
    alias = bench.scratch.alias
    rows = [BenchRow(id=number, key="business") for number in range(count)]
    for row in rows:
        row._state.db, row._state.adding = alias, False
    instances = [{"row": row} for row in rows]
    plain = [{"order": number, "total": "12.50", "items": [1, 2, 3]} for number in range(count)]
    keys = [f"key {number:08}" for number in range(count)]

    def ours(payloads: list[dict[str, Any]]) -> float:
        refill(bench.scratch, 0)
        events = [
            {"group": "bench", "key": key, **payload}
            for key, payload in zip(keys, payloads, strict=True)
        ]
        started = time.perf_counter()
        spark_outbox.emit_many(events, using=alias)
        return count / (time.perf_counter() - started)

    def bare(payloads: list[dict[str, Any]]) -> float:
        refill(bench.scratch, 0)
        columns = [keys, ["bench"] * count, [dump(payload) for payload in payloads], ["{}"] * count]
        with bench.scratch.connect() as connection:
            started = time.perf_counter()
            connection.execute(INSERT_MANY, columns)
            return count / (time.perf_counter() - started)

    rate, baseline, plain_rate, plain_baseline = bench.medians(
        lambda: ours(instances), lambda: bare(instances), lambda: ours(plain), lambda: bare(plain)
    )
    return [
        Figure("emit_many", rate, "events/s", baseline, Goal(">=", 0.85)),
        Figure("emit_many_plain", plain_rate, "events/s", plain_baseline, Goal(">=", 0.85)),
    ]


@measure
def emit_contended(bench: Bench) -> list[Figure]:
    """Many writers beside a worker, against no trigger; also with a trigger that always notifies."""
    count = bench.size(40_000)
    worker = handlers(noop)

    def with_trigger(mode: str) -> float:
        refill(bench.scratch, 0)
        waking.set_wake_mode(mode, using=bench.scratch.alias)
        # Without a trigger nothing wakes the worker: let it poll as often as it would be woken.
        with child_workers(bench.scratch, worker, poll_interval=POLL if mode == "never" else None):
            rate = transactions_a_second(bench.scratch, count)
        waking.set_wake_mode("gated", using=bench.scratch.alias)
        return rate

    gated, never, always = bench.medians(
        lambda: with_trigger("gated"), lambda: with_trigger("never"), lambda: with_trigger("always")
    )
    unit = "transactions/s"
    return [
        Figure("emit_contended", gated, unit, never, Goal(">=", 0.9)),
        Figure("emit_contended_always", always, unit, never),
    ]


def transactions_a_second(scratch: Scratch, count: int) -> float:
    """Let writers commit `count` transactions in all, side by side, each on a connection of its own and
    as fast as it can; return commits a second."""
    each = count // CONNECTIONS
    with ExitStack() as stack, ThreadPoolExecutor(CONNECTIONS) as pool:
        writers = [stack.enter_context(scratch.connect()) for _ in range(CONNECTIONS)]
        started = time.perf_counter()
        list(pool.map(lambda writer: writer.execute(TRANSACTIONS % {"count": each}), writers))
        return each * CONNECTIONS / (time.perf_counter() - started)
