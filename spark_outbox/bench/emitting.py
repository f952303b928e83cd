"""Measures the cost of emitting."""

import threading
import time
from collections.abc import Callable

from django.db import connections, transaction

import spark_outbox
from spark_outbox.bench.figures import Bench, Figure, Goal, measure
from spark_outbox.bench.load import child_workers, handlers, noop, refill
from spark_outbox.bench.scratch import BenchRow
from spark_outbox.events.encoding import dump
from spark_outbox.store import waking

CONNECTIONS = 64

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
    """emit_many() of dicts with a model instance each, against one INSERT of prepared rows."""
    count = bench.size(20_000)
    alias = bench.scratch.alias
    refill(bench.scratch, 0)
    rows = [BenchRow(id=number, key="business") for number in range(count)]
    for row in rows:
        row._state.db, row._state.adding = alias, False
    keys = [f"key {row.id:08}" for row in rows]
    payloads = [dump({"row": row}) for row in rows]
    columns = [keys, ["bench"] * count, payloads, ["{}"] * count]

    def ours() -> float:
        refill(bench.scratch, 0)
        events = [
            {"group": "bench", "key": key, "row": row} for key, row in zip(keys, rows, strict=True)
        ]
        started = time.perf_counter()
        spark_outbox.emit_many(events, using=alias)
        return count / (time.perf_counter() - started)

    def bare() -> float:
        refill(bench.scratch, 0)
        with bench.scratch.connect() as connection:
            started = time.perf_counter()
            connection.execute(INSERT_MANY, columns)
            return count / (time.perf_counter() - started)

    rate, baseline = bench.medians(ours, bare)
    return [Figure("emit_many", rate, "events/s", baseline, Goal(">=", 0.4))]


@measure
def emit_contended(bench: Bench) -> list[Figure]:
    """Many writers beside a worker, against no trigger; also with a trigger that always notifies."""
    count = bench.size(40_000) // CONNECTIONS
    worker = handlers(noop)

    def with_trigger(mode: str) -> float:
        refill(bench.scratch, 0)
        waking.set_wake_mode(mode, using=bench.scratch.alias)
        writers = [bench.scratch.connect() for _ in range(CONNECTIONS)]
        threads = [
            threading.Thread(target=writer.execute, args=[TRANSACTIONS % {"count": count}])
            for writer in writers
        ]
        # Without a trigger nothing wakes the worker: let it poll as often as it would be woken.
        with child_workers(bench.scratch, worker, poll_interval=0.005 if mode == "never" else None):
            started = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - started
        for writer in writers:
            writer.close()
        waking.set_wake_mode("gated", using=bench.scratch.alias)
        return count * CONNECTIONS / seconds

    gated, never, always = bench.medians(
        lambda: with_trigger("gated"), lambda: with_trigger("never"), lambda: with_trigger("always")
    )
    unit = "transactions/s"
    return [
        Figure("emit_contended", gated, unit, never, Goal(">=", 0.9)),
        Figure("emit_contended_always", always, unit, never),
    ]
