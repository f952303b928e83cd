"""Scrapes of a real worker, parsed as Prometheus does."""

import re
from functools import cache
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from spark_outbox import emit
from spark_outbox.models import OutboxEvent
from tests.tools import WorkerProcess, eventually, free_port, get, wait_until_asleep

Sample = tuple[str, frozenset[tuple[str, str]]]


def parsed(text: str) -> dict[Sample, float]:
    """Return the value of each time series."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: dict[Sample, float], name: str, **labels: str) -> float:
    """Return the sum of the time series of this name that have these labels."""
    return sum(
        found
        for (other, with_), found in samples.items()
        if other == name and labels.items() <= dict(with_).items()
    )


def scrape(port: int) -> dict[Sample, float]:
    def answered() -> str | None:
        answer = get(port, "/metrics")
        return answer[1] if answer and answer[0] == 200 else None

    return parsed(str(eventually(answered)))


def folder_of(pid: int) -> Path:
    """Return where the processes of this supervisor write what they count. It is not in what the kernel
    shows of its environment, so it is read off the files that a child has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    found = re.search(r"\S*/spark_metrics_\w+(?=/)", maps)
    assert found
    return Path(found[0])


@cache
def every_name() -> frozenset[str]:
    """Return the names of all time series that a worker has, once something of each kind has happened.

    Call it in a test whose database is committed to.
    """
    emit("g", "waiting", delay=3600)
    waiting = {"handler": "h", "error": "spark_outbox: not called, its circuit is open"}
    OutboxEvent.objects.get(key="waiting").deliveries.create(**waiting)
    port = free_port()
    with WorkerProcess("--metrics-port", str(port)) as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        emit("probe", "works", emits="another")
        emit({"group": "probe", "key": "fails", "raise": "no"})
        eventually(OutboxEvent.objects.filter(key="fails", attempts__gt=0).exists)
        wait_until_asleep()
        return frozenset(name for name, _ in scrape(port))
