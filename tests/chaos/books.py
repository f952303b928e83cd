"""The books of a run compare its commits with its effects. All figures but the counts must be 0."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from tests.chaos.promised import AT_LEAST_ONCE, DOOMED, EXACTLY_ONCE, LATE

LOST = """
select key from chaos_order where not exists (
    select from spark_outbox_event as event where event.key = chaos_order.key
)
"""
ROLLED_BACK = """
select key from spark_outbox_event where not exists (
    select from chaos_order where chaos_order.key = spark_outbox_event.key
)
"""
STUCK = f"""
select key from spark_outbox_event
where status <> case event_group when '{DOOMED}' then 'failed' else 'done' end
"""
NOT_DONE = """
select key from chaos_order where "group" ~ %(groups)s and not exists (
    select from chaos_effect as effect where effect.key = chaos_order.key and handler = %(handler)s
)
"""
DONE_TWICE = "select key from chaos_effect group by key, handler having count(*) > 1"
NOT_OWED = f"select key from chaos_effect where handler <> all(array{[*EXACTLY_ONCE, *LATE]})"
GIVEN_UP = f"""
select event.key || ' by ' || delivery.handler
from spark_outbox_delivery as delivery join spark_outbox_event as event on event.id = delivery.event_id
where delivery.handler = any(array{list(LATE)}) and not exists (
    select from chaos_effect as effect
    where effect.key = event.key and effect.handler = delivery.handler
)
"""
OUT_OF_ORDER = """
select key from (
    select key, event_id, max(event_id) over (partition by ordering_key order by id) as highest
    from chaos_effect where ordering_key is not null and handler = 'ledger'
) as effect where event_id < highest
"""
STORED_OUT_OF_ORDER = """
select key from (
    select key, position, max(position) over (partition by ordering_key order by event.id) as highest
    from chaos_order join spark_outbox_event as event using (key, ordering_key)
) as emitted where position < highest
"""
TOO_EARLY = """
select key from chaos_effect as effect join chaos_order using (key)
where effect.at < chaos_order.created_at + chaos_order.delay - interval '1 s'
"""
UNBALANCED = "select id::text from chaos_account where balance <> 0"


class Done(NamedTuple):
    """A line of an append-only file: an effect outside of the database."""

    key: str
    event_id: int
    transaction: int
    at: float


class Books:
    """`connection` is to the database of the run; `files` is the folder of the effects outside of it."""

    def __init__(self, connection: psycopg.Connection[Any], files: Path) -> None:
        self._connection = connection
        self._files = files

    def faults(self) -> dict[str, list[str]]:
        """Return the keys of events for which a promise was broken, by the name of the fault."""
        outside = self.outside("outside")
        return {
            "lost": [
                *self._keys(LOST),
                *self._unknown_to_the_database(),
                *self._not_done(),
                *self._keys(GIVEN_UP),
            ],
            "of rolled back transactions": self._keys(ROLLED_BACK),
            "stuck": self._keys(STUCK),
            "done twice in the database": self._keys(DONE_TWICE),
            "done by handlers that failed": self._keys(NOT_OWED),
            "out of order": [
                *self._keys(STORED_OUT_OF_ORDER),
                *self._keys(OUT_OF_ORDER),
                *self._out_of_order(outside),
            ],
            "before their time": self._keys(TOO_EARLY),
            "half a transfer": self._keys(UNBALANCED),
            "repeated outside without cause": self._without_cause(outside),
            "settings of another handler": [each.key for each in self.outside("leaked")],
        }

    def counts(self) -> dict[str, int]:
        """Return how much the run has done: the more, the more its books prove."""
        counts = {
            "events": len(self._keys("select key from spark_outbox_event")),
            "effects in the database": len(self._keys("select key from chaos_effect")),
            "tried more than once": len(
                self._keys("select distinct event_id from spark_outbox_delivery where attempts > 1")
            ),
            "acknowledged": len(self._noted("acknowledged")),
            "collisions of ids": self._collisions(),
            "with an order": len(
                self._keys("select key from chaos_order where ordering_key is not null")
            ),
            "rolled back": len(self._noted("rolled_back") - set(self._keys(LOST.partition("where")[0]))),
        }
        for handler in AT_LEAST_ONCE:
            done = self.outside(handler)
            counts[f"{handler}: effects"] = len(done)
            counts[f"{handler}: repeated"] = len(done) - len({each.key for each in done})
        return counts

    def _collisions(self) -> int:
        return sum(len(file.read_text().splitlines()) for file in self._files.glob("*.collided"))

    def outside(self, handler: str) -> list[Done]:
        file = self._files / f"{handler}.effects"
        lines = file.read_text().splitlines() if file.exists() else []
        return [
            Done(key, int(event_id), int(transaction), float(at))
            for key, event_id, transaction, at in map(str.split, lines)
        ]

    def longest_repeated_batch(self) -> float:
        """Return the seconds between the first and the last effect that one rollback repeated."""
        times: dict[int, list[float]] = defaultdict(list)
        for each in self._rolled_back(self.outside("outside")):
            times[each.transaction].append(each.at)
        return max((max(each) - min(each) for each in times.values()), default=0.0)

    def _keys(self, sql: str, **params: Any) -> list[str]:
        return [key for (key,) in self._connection.execute(sql, params or None)]

    def _noted(self, what: str) -> set[str]:
        files = (file.read_text() for file in self._files.glob(f"*.{what}"))
        # Only whole lines: kill -9 may cut off the last one.
        return {key for text in files for key in text.rpartition("\n")[0].split()}

    def _unknown_to_the_database(self) -> set[str]:
        """Return keys whose commit the server confirmed, but which it does not have."""
        return self._noted("acknowledged") - set(self._keys("select key from chaos_order"))

    def _not_done(self) -> Iterator[str]:
        """Yield effects that a handler has not done, in the database or outside."""
        for handler, groups in EXACTLY_ONCE.items():
            for key in self._keys(NOT_DONE, handler=handler, groups=groups):
                yield f"{key} by {handler}"
        for handler, groups in AT_LEAST_ONCE.items():
            owed = self._keys('select key from chaos_order where "group" ~ %(groups)s', groups=groups)
            for key in set(owed) - {each.key for each in self.outside(handler)}:
                yield f"{key} by {handler}"

    def _out_of_order(self, done: list[Done]) -> Iterator[str]:
        """Yield events whose first effect came after that of a later one of their ordering key."""
        ordering = dict(
            self._connection.execute(
                "select id, ordering_key from spark_outbox_event where ordering_key is not null"
            ).fetchall()
        )
        highest: Counter[str] = Counter()
        seen: set[int] = set()
        for each in done:
            key = ordering.get(each.event_id)
            if key is not None and each.event_id not in seen:
                seen.add(each.event_id)
                if each.event_id < highest[key]:
                    yield each.key
                highest[key] = max(highest[key], each.event_id)

    def _rolled_back(self, done: list[Done]) -> Iterator[Done]:
        """Yield effects that are not in the ledger: their transaction was rolled back.

        Its id alone proves nothing: after a crash the server reuses ids that were not yet in its log.
        """
        kept = set(
            self._connection.execute(
                "select key, transaction from chaos_effect where handler = 'outside'"
            ).fetchall()
        )
        return (each for each in done if (each.key, each.transaction) not in kept)

    def _without_cause(self, done: list[Done]) -> list[str]:
        """Return effects outside that were repeated although their transaction was committed."""
        repeated = Counter(each.key for each in done)
        repeated.subtract(each.key for each in self._rolled_back(done))
        return [key for key, count in repeated.items() if count != 1]
