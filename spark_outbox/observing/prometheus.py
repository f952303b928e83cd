"""What this process emits and handles, as metrics of Prometheus. Needs the extra `prometheus`.

They are in registries of their own, so that they meet none of the project's. The worker processes of one
supervisor write theirs into files of one folder, see files.py; each scrape reads them. A file belongs to
a place under the supervisor, and not to a process: the next process of the place goes on with it. So no
total ever falls, and the number of files is bounded.
"""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import prometheus_client
from django.dispatch import Signal
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from spark_outbox.events.event import available_from
from spark_outbox.observing import hooks
from spark_outbox.observing.files import PREFIX, Bounded, Distribution, Numbers, Total
from spark_outbox.observing.hooks import Made

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client's environment variable: the folder that the processes of a project share."""

MOST_GROUPS = 50

DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
WAITS = (*DURATIONS, 900, 3600, 21_600, 86_400)
SIZES = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)

EMITTED = ("events_emitted", "Events emitted, also those whose transaction was rolled back later.")


def count_emitted(add: Callable[[str], object], group: Bounded, uid: str) -> None:
    """Have `add` called with the group of each event that this process emits."""
    _connect(hooks.event_emitted, lambda **event: add(group(event["group"])), uid)


def counter_of_emitted(registry: CollectorRegistry, group: Bounded) -> None:
    """Count what this process emits, in a registry; not in a process that counts in files."""
    name, text = EMITTED
    counter = prometheus_client.Counter(PREFIX + name, text, ["group"], registry=registry)
    if not _files:
        count_emitted(lambda name: counter.labels(name).inc(), group, _UID_OF_REGISTRY)


class Handled:
    """Counts what this process handles, as a worker."""

    def __init__(self, totals: Numbers, distributions: Numbers, group: Bounded) -> None:
        self._group = group
        self._deliveries = Total(
            totals,
            "deliveries",
            "Attempts that were settled: handled, failed for good, to be retried, or discarded.",
            *("handler", "group", "outcome"),
        )
        self._duration = Distribution(
            distributions,
            "handler_duration_seconds",
            "The duration of calls of handlers.",
            DURATIONS,
            "handler",
        )
        self._wait = Distribution(
            distributions,
            "wait_seconds",
            "From when an event could be handled to its first attempt, without a delay on purpose.",
            WAITS,
            "handler",
        )
        self._batch = Distribution(
            distributions, "batch_events", "Events that were settled in one transaction.", SIZES
        )
        self._commit = Distribution(
            distributions,
            "commit_duration_seconds",
            "From the end of a batch's last call to the end of its commit.",
            DURATIONS,
        )
        self._reconnects = Total(
            totals, "reconnects", "Times that a worker had to connect to the database anew."
        )
        self._wakes = Total(totals, "wakes", "Ends of a worker's sleep, by their reason.", "reason")
        _connect(hooks.calls_settled, self._count)
        _connect(hooks.batch_settled, self._settled)
        _connect(hooks.worker_state_changed, self._changed)

    def _count(
        self, calls: Sequence[Made], statuses: Mapping[tuple[int, str], str], others: str, **_: Any
    ) -> None:
        numbers: Counter[tuple[str, str, str]] = Counter()
        durations: defaultdict[str, list[float]] = defaultdict(list)
        waits: defaultdict[str, list[float]] = defaultdict(list)
        now = time.time() - time.monotonic()
        for handler, events, attempt, started, seconds in calls:
            status = ""
            for event in events:
                status = statuses.get((event.id, handler), others) if statuses else others
                numbers[handler, event.group, status] += 1
                if attempt == 1 and started and status:
                    wait = now + started - available_from(event)
                    waits[handler].append(wait if wait > 0 else 0.0)  # max() is slow
            if started and status:
                durations[handler].append(seconds)
        for (handler, group, status), number in numbers.items():
            if outcome := hooks.OUTCOMES.get(status):
                self._deliveries.add(number, handler, self._group(group), outcome)
        for handler, each in durations.items():
            self._duration.add(each, handler)
        for handler, each in waits.items():
            self._wait.add(each, handler)

    def _settled(self, events: int, commit_seconds: float, **_: Any) -> None:
        self._batch.add([events])
        self._commit.add([commit_seconds])

    def _changed(self, state: str, reason: str, **_: Any) -> None:
        if state == "disconnected":
            self._reconnects.add(1)
        elif state == "awake":
            self._wakes.add(1, reason)


def count_in(folder: Path, place: str) -> None:
    """In a new worker process: count from now on, in files that `place` has to itself. Raises OSError.

    It counts in no registry any more: a scrape of the web side, whose URLs the worker may have imported,
    would have its emissions again.
    """
    group = Bounded(MOST_GROUPS, folder / "groups")
    totals = Numbers(folder / f"counter_{place}.db")
    distributions = Numbers(folder / f"histogram_{place}.db")
    _files.extend([totals, distributions])
    hooks.event_emitted.disconnect(dispatch_uid=_UID_OF_REGISTRY)
    emitted = Total(totals, *EMITTED, "group")
    count_emitted(lambda name: emitted.add(1, name), group, _UID)
    Handled(totals, distributions, group)
    os.register_at_fork(after_in_child=stop)  # what a handler forks would write into the same files


def scrape(*collectors: Collector) -> bytes:
    """Return all that these have, as text for Prometheus."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return generate_latest(registry)


_UID = "spark_outbox.prometheus"
_UID_OF_REGISTRY = "spark_outbox.prometheus.registry"

_files: list[Numbers] = []
"""Those of this process, if it is a worker."""


def _connect(signal: Signal, receiver: Any, uid: str = _UID) -> None:
    """Have this receiver take the place of one that we had before."""
    signal.disconnect(dispatch_uid=uid)
    signal.connect(receiver, weak=False, dispatch_uid=uid)


def stop() -> None:
    """Count no more in files."""
    for signal in (
        hooks.event_emitted,
        hooks.calls_settled,
        hooks.batch_settled,
        hooks.worker_state_changed,
    ):
        signal.disconnect(dispatch_uid=_UID)
