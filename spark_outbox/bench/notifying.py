"""Measures the cost of waking for many writers beside idle processes, and how often they notify."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from spark_outbox.bench.emitting import POLL, TRANSACTIONS, run_at_once, transactions_a_second
from spark_outbox.bench.figures import Bench, Figure, Goal, measure
from spark_outbox.bench.load import handlers, noop, refill
from spark_outbox.bench.resting import CROWD, asleep, supervised
from spark_outbox.store import waking

WRITERS = 16

LEAST = 8_000
"""Transactions, also with --quick: with fewer, the first moments count for too much."""

PACE = 50
"""Transactions a second of each writer that does not hurry."""

# Like TRANSACTIONS, but each at its time. The sleep is in a transaction that has not emitted.
PACED = """
do $$
declare
    due timestamptz := clock_timestamp() + %(after)s * interval '1 second';
begin
    for number in 1..%(count)s loop
        perform pg_sleep(extract(epoch from due - clock_timestamp()));
        insert into spark_bench_row (key) values ('business');
        insert into spark_outbox_event (key, event_group) values (gen_random_uuid()::text, 'bench');
        commit;
        due := due + %(pause)s * interval '1 second';
    end loop;
end $$
"""


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
            rate = transactions_a_second(bench.scratch, count, writers=WRITERS)
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
    fast = max(LEAST, bench.size(40_000)) // WRITERS
    slow = int(bench.seconds(10) * PACE)
    pause = 1 / PACE
    full, paced = bench.medians(
        lambda: share(bench, [TRANSACTIONS % {"count": fast}] * WRITERS, fast * WRITERS),
        lambda: share(
            bench,
            [
                PACED % {"count": slow, "pause": pause, "after": pause * number / WRITERS}
                for number in range(WRITERS)
            ],
            slow * WRITERS,
        ),
    )
    return [
        Figure("notify_share", full, "of commits", goal=Goal("<", 0.01)),
        Figure("notify_share_paced", paced, "of commits", goal=Goal("<", 0.05)),
    ]


def share(bench: Bench, statements: Sequence[str], commits: int) -> float:
    """Run statements at once that make so many commits in all; return the share that has notified.

    A listener gets one notification of each such commit. It holds no S, so no trigger sees it.
    """
    refill(bench.scratch, 0)
    with (
        asleep(bench.scratch, handlers(noop), counts=[CROWD]),
        bench.scratch.connect() as listener,
    ):
        listener.execute(waking.LISTEN)
        run_at_once(bench.scratch, statements)
        notified = 0
        while more := sum(1 for _ in listener.notifies(timeout=0.5)):
            notified += more
    return notified / commits
