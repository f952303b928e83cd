"""The state of the outbox, as metrics of Prometheus: read from bounded views of the database."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from django.db import connections
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from spark_outbox.errors import describe
from spark_outbox.observing.files import PREFIX, Bounded
from spark_outbox.observing.prometheus import MOST_GROUPS
from spark_outbox.operating import look
from spark_outbox.operating.look import Figures
from spark_outbox.store.viewing import Row

logger = logging.getLogger(__name__)

INTERVAL = 15.0
"""Seconds for which what was read is good enough."""

PATIENCE = 3.0
"""Seconds that a scrape waits for the database. Prometheus itself gives up after 10, by default."""

STATES = ("ready", "delayed", "retrying", "running", "failed", "unhandled")
WORKER_STATES = ("busy", "resting", "watch", "unknown", "gone")
PAUSES = ("handler", "group")

Samples = Mapping[tuple[str, ...], float]
"""Values by those of the labels."""


class Database:
    """A collector that reads the outbox at most once in INTERVAL, in one thread of its own.

    A scrape waits for that thread, but not longer than PATIENCE: a database that hangs must not cost
    Prometheus what is counted elsewhere. Then it gets what was read before; and once that is older than
    two INTERVALs, or if the outbox can't be read, `database_up` is 0, and all else is absent.
    """

    def __init__(self, using: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._using = using
        self._clock = clock
        self._group = Bounded(MOST_GROUPS)
        self._handler = Bounded(MOST_GROUPS)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._found: tuple[float, list[Metric]] = (-math.inf, [])
        """When reading has ended, and what was read."""

    def collect(self) -> Iterable[Metric]:
        if thread := self._reading():
            thread.join(PATIENCE)
        read_at, metrics = self._found
        return metrics if self._clock() - read_at < 2 * INTERVAL else _down()

    def _reading(self) -> threading.Thread | None:
        """Return the thread that reads; it is begun if it is time."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return self._thread
            if self._clock() - self._found[0] < INTERVAL:
                return None
            self._thread = threading.Thread(target=self._read, name="spark_metrics", daemon=True)
            self._thread.start()
            return self._thread

    def _read(self) -> None:
        try:
            metrics = self._metrics()
        except Exception as error:  # noqa: BLE001, whatever it is, the scrape goes on without
            details: dict[str, object] = {"database": self._using, "error": describe(error)}
            logger.warning(
                "The outbox of database %(database)s can't be read for metrics (%(error)s).",
                details,
                extra=details,
            )
            metrics = _down()
        finally:
            connections[self._using].close()
        self._found = (self._clock(), metrics)

    def _metrics(self) -> list[Metric]:
        found = look.figures(using=self._using)
        return [
            _gauge("database_up", "Whether the outbox could be read.", {(): 1.0}),
            *self._events(found.groups),
            *self._circuits(found),
            *_others(found),
        ]

    def _events(self, groups: list[Row]) -> Iterable[Metric]:
        depth: dict[tuple[str, ...], float] = {}
        lags: dict[tuple[str, ...], float] = {}
        held: dict[tuple[str, ...], float] = dict.fromkeys([("circuit",), ("pause",)], 0.0)
        for row in groups:
            group = self._group(row["group"])
            for state in STATES:
                depth[state, group] = depth.get((state, group), 0.0) + row[state]
            lags[(group,)] = max(lags.get((group,), 0.0), row["late"] or 0.0)
            held[("circuit",)] += row["waits_for_circuit"]
            held[("pause",)] += row["paused"]
        help_ = "Events by state and group. A number of 10000 means that or more."
        yield _gauge("events", help_, depth, "state", "group")
        help_ = "Events that could be handled but for an open circuit or a pause."
        yield _gauge("events_held", help_, held, "by")
        help_ = "The age of the oldest event that could be handled if all were well."
        yield _gauge("lag_seconds", help_, {(): max(lags.values(), default=0.0)})
        yield _gauge("group_lag_seconds", f"{help_} By group.", lags, "group")

    def _circuits(self, found: Figures) -> Iterable[Metric]:
        names = {self._handler(name) for name in found.open_circuits}
        help_ = "Handlers for which events wait, since they fail on everything: 1."
        yield _gauge("circuit_open", help_, {(name,): 1.0 for name in sorted(names)}, "handler")


def _down() -> list[Metric]:
    return [_gauge("database_up", "Whether the outbox could be read.", {(): 0.0})]


def _others(found: Figures) -> Iterable[Metric]:
    workers: dict[tuple[str, ...], float] = {(state,): 0.0 for state in WORKER_STATES}
    for row in found.workers:
        workers[(row["state"],)] += 1
    yield _gauge("workers", "Worker processes that can be seen, by state.", workers, "state")
    pauses: dict[tuple[str, ...], float] = {(kind,): 0.0 for kind in PAUSES}
    for row in found.pauses:
        pauses[(row["kind"],)] += 1
    yield _gauge("pauses", "Handlers and groups that are paused by hand.", pauses, "kind")
    checks: dict[tuple[str, ...], float] = {
        (check["name"],): look.BY_SEVERITY.index(check["status"]) for check in found.health
    }
    yield _gauge("health", "The checks of spark_health: 0 ok, 1 warning, 2 critical.", checks, "check")
    if found.overdue is not None:
        help_ = "By how much the oldest event has outlived the setting RETENTION."
        yield _gauge("retention_overdue_seconds", help_, {(): found.overdue})


def _gauge(name: str, text: str, samples: Samples, *labels: str) -> Metric:
    metric = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for values, value in samples.items():
        metric.add_metric(values, value)
    return metric
