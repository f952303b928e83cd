"""Prune events by hand: those that the settings name, or others that somebody chooses."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from spark_outbox import conf
from spark_outbox.store import pruning
from spark_outbox.store.pruning import Holder, Pruned
from spark_outbox.worker.retention import Chunks, Portion

CHUNK_SECONDS = 0.05
"""The time of a chunk: it locks rows that have ended, so no worker waits for it."""

LONGEST_REST = 1.0
"""Seconds between two chunks at the most."""

COUNTED = 100_000
"""To count more events of a group than this would take too long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which events to prune."""

    states: tuple[str, ...] = ()
    """Those of which RETENTION prunes any if none is given."""
    group: str = ""
    """A regular expression."""
    older_than: float | None = None
    """Seconds since they ended. It replaces what RETENTION says. States that RETENTION keeps for ever
    must be named for that, and groups that it keeps for ever too."""

    def portions(self, *, using: str) -> list[Portion]:
        """Return what there is to prune, by state and group."""
        retention = conf.current().RETENTION
        found = []
        states = self.states or retention.prunes or ("done", "discarded")
        for ended in pruning.oldest(list(states), using=using):
            seconds = self._seconds(retention, ended.state, ended.group)
            if seconds is not None and ended.age > seconds and re.search(self.group, ended.group):
                found.append(Portion(ended.state, ended.group, seconds))
        return found

    def _seconds(self, retention: conf.Retention, state: str, group: str) -> float | None:
        by_setting = retention.seconds(state, group)
        if self.older_than is None:
            return by_setting
        if by_setting is None and not self.group:
            keeps_state = dict(retention.states).get(state) is None
            if not (keeps_state and state in self.states):
                return None
        return self.older_than


def count(portion: Portion, *, using: str) -> int:
    """Return how many events there are to prune, COUNTED + 1 if there are more than COUNTED."""
    state, group, seconds = portion
    return pruning.count_ended(state, group, seconds=seconds, most=COUNTED + 1, using=using)


def count_keys(seconds: float, *, using: str) -> int:
    """Return how many keys of pruned events are so old, up to COUNTED + 1."""
    return pruning.count_keys(seconds=seconds, most=COUNTED + 1, using=using)


def prune(portions: Sequence[Portion], *, using: str) -> Iterator[Pruned | Holder]:
    """Prune events; yield what each chunk did, or who holds a snapshot, as long as somebody does.

    Rests after each chunk for as long as that took: a server that is busy gets more time.
    """
    chunks = _chunks(using)
    return _paced(chain.from_iterable(map(chunks.prune, portions)))


def forget_keys(seconds: float, *, using: str) -> Iterator[Pruned | Holder]:
    """Delete the keys of pruned events that were emitted so many seconds ago; yield as `prune` does."""
    return _paced(_chunks(using).forget_keys(seconds))


def _paced(chunks: Iterator[Pruned | Holder]) -> Iterator[Pruned | Holder]:
    started = time.monotonic()
    for each in chunks:
        took = time.monotonic() - started
        yield each
        if isinstance(each, Pruned):
            time.sleep(min(took, LONGEST_REST))
        started = time.monotonic()


def _chunks(using: str) -> Chunks:
    return Chunks(seconds=CHUNK_SECONDS, using=using, insists=True)
