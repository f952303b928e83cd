"""What this process emits and handles, as metrics of Prometheus. Needs the extra `prometheus`.

They are in registries of their own, so that they meet none of the project's. The worker processes of one
supervisor write theirs into files of one folder, by prometheus_client's multiprocess mode; each scrape
reads them. A file belongs to a place under the supervisor, and not to a process: the next process of the
place goes on with it. So no total ever falls, and the number of files is bounded.
"""

import fcntl
import json
import os
import threading
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from django.dispatch import Signal
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from spark_outbox.observing import hooks
from spark_outbox.observing.hooks import HandlerCall

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable of prometheus_client with the folder of the files."""

PREFIX = "spark_outbox_"

MOST_GROUPS = 50
OTHER = "other"

DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
WAITS = (*DURATIONS, 900, 3600, 21_600, 86_400)
SIZES = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)

OUTCOMES = {"done": "handled", "failed": "failed", "pending": "retried", "discarded": "discarded"}
"""By the status of a delivery after the call."""


class Bounded:
    """The names that have a time series of their own: the first `most` that come; others share OTHER.

    With a `file`, that goes for all processes that share it, also for those that come later.
    """

    def __init__(self, most: int, file: Path | None = None) -> None:
        self._most = most
        self._file = file
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, name: str) -> str:
        if name in self._known:
            return name
        if len(self._known) < self._most:
            with self._lock:
                self._add(name)
        return name if name in self._known else OTHER

    def _add(self, name: str) -> None:
        """Add the name if there is room."""
        if self._file is None:
            if len(self._known) < self._most:
                self._known.add(name)
            return
        with self._file.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            self._known.update(map(json.loads, file))
            if len(self._known) < self._most and name not in self._known:
                file.write(json.dumps(name) + "\n")
                self._known.add(name)


class Emitted:
    """What this process emits."""

    def __init__(self, registry: CollectorRegistry, group: Bounded) -> None:
        self._group = group
        self._events = Counter(
            f"{PREFIX}events_emitted",
            "Events emitted, also those whose transaction was rolled back later.",
            ["group"],
            registry=registry,
        )
        _connect(hooks.event_emitted, self._count)

    def _count(self, group: str, **_: Any) -> None:
        self._events.labels(self._group(group)).inc()


class Handled:
    """What this process handles, as a worker."""

    def __init__(self, registry: CollectorRegistry, group: Bounded) -> None:
        self._group = group
        self._deliveries = Counter(
            f"{PREFIX}deliveries",
            "Attempts that were settled: handled, failed for good, to be retried, or discarded.",
            ["handler", "group", "outcome"],
            registry=registry,
        )
        self._duration = Histogram(
            f"{PREFIX}handler_duration_seconds",
            "The duration of calls of handlers.",
            ["handler"],
            registry=registry,
            buckets=DURATIONS,
        )
        self._wait = Histogram(
            f"{PREFIX}wait_seconds",
            "From when an event could be handled to its first attempt, without a delay on purpose.",
            ["handler"],
            registry=registry,
            buckets=WAITS,
        )
        self._batch = Histogram(
            f"{PREFIX}batch_events",
            "Events that were settled in one transaction.",
            registry=registry,
            buckets=SIZES,
        )
        self._commit = Histogram(
            f"{PREFIX}commit_duration_seconds",
            "From the end of a batch's last call to the end of its commit.",
            registry=registry,
            buckets=DURATIONS,
        )
        self._reconnects = Counter(
            f"{PREFIX}reconnects",
            "Times that a worker had to connect to the database anew.",
            registry=registry,
        )
        self._wakes = Counter(
            f"{PREFIX}wakes", "Ends of a worker's sleep, by their reason.", ["reason"], registry=registry
        )
        _connect(hooks.delivery_finished, self._finished)
        _connect(hooks.batch_settled, self._settled)
        _connect(hooks.worker_state_changed, self._changed)

    def _finished(self, call: HandlerCall, **_: Any) -> None:
        for event in call.events:
            if outcome := OUTCOMES.get(call.statuses.get(event.id, "")):
                self._deliveries.labels(call.handler, self._group(event.group), outcome).inc()
                if event.attempt == 1 and (since := event.available_at or event.created_at):
                    self._wait.labels(call.handler).observe(max(0.0, call.started_at - _seconds(since)))
        if call.seconds and call.statuses:
            self._duration.labels(call.handler).observe(call.seconds)

    def _settled(self, events: int, commit_seconds: float, **_: Any) -> None:
        self._batch.observe(events)
        self._commit.observe(commit_seconds)

    def _changed(self, state: str, reason: str, **_: Any) -> None:
        if state == "disconnected":
            self._reconnects.inc()
        elif state == "awake":
            self._wakes.labels(reason).inc()


class InFiles:
    """What processes have written into the files of a folder; our metrics alone."""

    def __init__(self, folder: str) -> None:
        self._collector = MultiProcessCollector(None, folder)

    def collect(self) -> Iterable[Metric]:
        return [metric for metric in self._collector.collect() if metric.name.startswith(PREFIX)]


def count_in(folder: Path, place: str) -> None:
    """In a new worker process: count from now on, in files that `place` has to itself.

    Metrics that the project makes from now on go there, too, and nobody reads them.
    """
    os.environ[FOLDER] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: place)
    registry, group = CollectorRegistry(), Bounded(MOST_GROUPS, folder / "groups")
    Emitted(registry, group)
    Handled(registry, group)
    os.register_at_fork(after_in_child=_stop)  # what a handler forks would write into the same files


def scrape(*collectors: Collector) -> bytes:
    """Return all that these have, as text for Prometheus."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return generate_latest(registry)


SIGNALS = (
    hooks.event_emitted,
    hooks.delivery_finished,
    hooks.batch_settled,
    hooks.worker_state_changed,
)
_UID = "spark_outbox.prometheus"


def _connect(signal: Signal, receiver: Any) -> None:
    """Have this receiver take the place of one that we had before."""
    signal.disconnect(dispatch_uid=_UID)
    signal.connect(receiver, weak=False, dispatch_uid=_UID)


def _stop() -> None:
    for signal in SIGNALS:
        signal.disconnect(dispatch_uid=_UID)


def _seconds(moment: datetime) -> float:
    """Return the seconds since 1970; without USE_TZ, times are of the process' own zone."""
    return moment.timestamp()
