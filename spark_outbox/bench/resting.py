"""Measures the cost of events that come one by one, to a small service and to a crowd of processes."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from spark_outbox.bench.figures import Bench, Figure, Goal, measure, percentile
from spark_outbox.bench.load import (
    PROC,
    Child,
    handlers,
    process_fields,
    refill,
    sleeping,
    wait_until,
)
from spark_outbox.bench.scratch import Scratch
from spark_outbox.bench.waking import Moments, bare_loop, emit_and_wait, moments
from spark_outbox.processes.fork import SIGNALS
from spark_outbox.processes.guard import Guard
from spark_outbox.processes.slot import Slot
from spark_outbox.processes.supervisor import Supervisor
from spark_outbox.processes.watch import Watch
from spark_outbox.registry.handlers import Registry
from spark_outbox.worker.loop import Worker

RATE = 20
"""Events a second."""

CROWD = 8

SERVICES = {"one": [1], "eight": [CROWD], "hosts": [2] * 4}
"""The worker processes of each supervisor, by the names of figures."""

Service = Callable[[Bench, Moments], AbstractContextManager[list[Child]]]
"""Runs processes that handle events, and note each one's arrival; gives the parents of others."""


@measure
def rest(bench: Bench) -> list[Figure]:
    """Processor time and latency of 20 events a second: of one worker process, against a bare loop
    that LISTENs; and of eight processes on one host and on four, against one."""
    if not PROC.exists():
        return []
    bare_cost, _, _, one, one50, one99, crowd, crowd50, crowd99, hosts, _, _ = bench.medians(
        partial(one_by_one, bench, bare),
        *(
            partial(one_by_one, bench, partial(supervisors, counts=counts))
            for counts in SERVICES.values()
        ),
    )
    return [
        Figure("rest_cost", one, "ms/event", bare_cost, Goal("<=", 1.6)),
        Figure("rest_cost_crowd", crowd, "ms/event", one, Goal("<=", 1.25)),
        Figure("rest_cost_hosts", hosts, "ms/event", one, Goal("<=", 2)),
        Figure("latency_crowd_p50", crowd50, "ms", one50, Goal("<=", 1.2)),
        Figure("latency_crowd_p99", crowd99, "ms", one99, Goal("<=", 1.5)),
    ]


@measure
def rates(bench: Bench) -> list[Figure]:
    """Processor time in a second, and latency, of 1, 20 and 200 events a second: of one worker process,
    and of eight on one host and on four. For a table: they have no goals.

    Linux counts the time of a process in hundredths of a second, so those of 1 event a second are rough.
    """
    if not PROC.exists():
        return []
    cases = [(name, rate) for name in SERVICES for rate in (1, 20, 200)]
    found = bench.medians(
        *(
            partial(one_by_one, bench, partial(supervisors, counts=SERVICES[name]), rate=rate)
            for name, rate in cases
        )
    )
    figures = []
    for (name, rate), cost, p50 in zip(cases, found[::3], found[1::3], strict=True):
        figures += [
            Figure(f"cost_{name}_{rate}", cost * rate, "ms/s"),
            Figure(f"latency_{name}_{rate}", p50, "ms"),
        ]
    return figures


def one_by_one(bench: Bench, service: Service, *, rate: int = RATE) -> tuple[float, float, float]:
    """Emit `rate` events a second; return the processor time of the server and the service, and the p50
    and p99 of the latency, all in milliseconds an event."""
    count = math.ceil(bench.seconds(15) * rate)
    refill(bench.scratch, 0)
    latencies = []
    with moments() as arrivals, service(bench, arrivals) as children:
        families = [postmaster(bench.scratch), *(child.pid for child in children)]
        time.sleep(0.5)
        used = -sum(map(family_seconds, families))
        start = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
            latencies.append(emit_and_wait(bench.scratch, arrivals))
        time.sleep(1 / rate)
        used += sum(map(family_seconds, families))
    return used * 1000 / count, percentile(latencies, 0.5), percentile(latencies, 0.99)


# Services


@contextmanager
def bare(bench: Bench, arrivals: Moments) -> Iterator[list[Child]]:
    with bare_loop(bench, arrivals) as child:
        yield [child]


@contextmanager
def supervisors(bench: Bench, arrivals: Moments, *, counts: list[int]) -> Iterator[list[Child]]:
    with asleep(bench.scratch, handlers(arrivals.note), counts=counts) as children:
        yield children


@contextmanager
def asleep(scratch: Scratch, registry: Registry, *, counts: list[int]) -> Iterator[list[Child]]:
    """One supervisor for each of `counts`, with as many worker processes, all of them asleep."""
    with ExitStack() as stack:
        children = [
            stack.enter_context(supervised(scratch, registry, processes=count)) for count in counts
        ]
        wait_until(partial(sleeping, scratch))
        time.sleep(1)
        yield children


@contextmanager
def supervised(
    scratch: Scratch, registry: Registry, *, processes: int, **options: Any
) -> Iterator[Child]:
    """Run workers under a supervisor, as `spark_worker` does, until the end of the block. It begins once
    all are ready."""
    ready, say_ready = os.pipe()

    def work(slot: Slot, watch: Watch, tell_ready: Callable[[], None]) -> int:
        worker = Worker(
            using=scratch.alias,
            registry=registry,
            guard=Guard(slot),
            watch=watch,
            on_ready=lambda _: tell_ready(),
            **options,
        )
        signal.signal(signal.SIGTERM, lambda *_: worker.stop())
        signal.set_wakeup_fd(worker.open(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        worker.run()
        return 0

    def say_so() -> None:
        os.write(say_ready, b"r")

    def supervise() -> None:
        supervisor = Supervisor(
            work,
            processes=processes,
            shutdown_timeout=10,
            answer_timeout=300,
            finite=False,
            on_ready=say_so,
            on_crash=lambda *_: None,
        )
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: supervisor.stop())
        supervisor.run()

    child = Child(supervise)
    try:
        os.read(ready, 1)
        yield child
    finally:
        os.kill(child.pid, signal.SIGTERM)
        os.waitpid(child.pid, 0)
        os.close(ready)
        os.close(say_ready)


# Processor time


def postmaster(scratch: Scratch) -> int:
    """Return the pid of the server's first process. Raises FileNotFoundError if it is elsewhere."""
    return parent(int(scratch.execute("select pg_backend_pid()")))


def family_seconds(pid: int) -> float:
    """Return the processor time of a process and all that descend from it, in seconds."""
    children: dict[int, list[int]] = {}
    for each in PROC.glob("[0-9]*"):
        try:
            children.setdefault(parent(int(each.name)), []).append(int(each.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended: its parent has its time
    family, total = [pid], 0
    for each_pid in family:
        family += children.get(each_pid, [])
        try:
            total += sum(map(int, process_fields(each_pid)[11:15]))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total / os.sysconf("SC_CLK_TCK")


def parent(pid: int) -> int:
    return int(process_fields(pid)[1])
