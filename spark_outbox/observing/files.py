"""Numbers in files, for Prometheus: each process has its own, and a scrape adds them up.

The files are those of prometheus_client's multiprocess mode. What it has for writing them is set up once
for a whole process, by the environment, where the project may have metrics of its own. So what writes
ours is here, and adds the calls of a batch at once. A disk that is full is an OSError: with a sparse
file, as prometheus_client has it, it would be the signal SIGBUS, and the end of the process.
"""

import contextlib
import fcntl
import json
import math
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

PREFIX = "spark_outbox_"

OTHER = "other"


INITIAL_SIZE = 1 << 16


class Allocated(MmapedDict):
    """A file whose space on the disk is there before it is written to. Raises OSError."""

    def __init__(self, file: Path) -> None:
        is_new = not file.exists() or not file.stat().st_size
        try:
            _allocate(file, INITIAL_SIZE if is_new else file.stat().st_size)
        except OSError:
            if is_new:
                file.unlink(missing_ok=True)  # no scrape can read an empty one
            raise
        super().__init__(str(file))  # type: ignore[no-untyped-call]

    def _init_value(self, key: str) -> None:
        needed = self._used + len(key.encode()) + 4 + 8 + 16  # its length, padding, and two numbers
        size = self._capacity
        while size < needed:
            size *= 2
        if size > self._capacity:
            _allocate(Path(self._fname), size)
        super()._init_value(key)  # type: ignore[no-untyped-call]


def _allocate(file: Path, size: int) -> None:
    # Not by the descriptor of MmapedDict, which appends: that won't do where it must be emulated.
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


class Numbers:
    """The numbers of one file. It belongs to one process at a time; the next one goes on with it."""

    def __init__(self, file: Path) -> None:
        self._file: MmapedDict = Allocated(file)
        self._lock = threading.Lock()

    def add(self, key: str, amount: float) -> None:
        with self._lock:
            before, _ = self._file.read_value(key)
            self._file.write_value(key, before + amount, 0.0)

    def close(self) -> None:
        self._file.close()


class Total:
    """A number that only grows, for each combination of the labels' values."""

    def __init__(self, numbers: Numbers, name: str, text: str, *labels: str) -> None:
        self._numbers = numbers
        self._of_all = (PREFIX + name, f"{PREFIX}{name}_total", labels, text)
        self._keys: dict[tuple[str, ...], str] = {}
        if not labels:
            self.add(0)

    def add(self, amount: float, *values: str) -> None:
        if values not in self._keys:
            metric, name, labels, text = self._of_all
            self._keys[values] = mmap_key(metric, name, list(labels), list(values), text)
        self._numbers.add(self._keys[values], amount)


class Distribution:
    """How many values were up to each of `bounds`, for each combination of the labels' values."""

    def __init__(
        self, numbers: Numbers, name: str, text: str, bounds: Sequence[float], *labels: str
    ) -> None:
        self._numbers = numbers
        self._bounds = (*bounds, math.inf)
        self._of_all = (PREFIX + name, text, labels)
        self._keys: dict[tuple[str, ...], list[str]] = {}
        if not labels:
            self.add([])

    def add(self, amounts: Sequence[float], *values: str) -> None:
        if values not in self._keys:
            self._begin(values)
        *buckets, total = self._keys[values]
        in_order, done = sorted(amounts), 0
        for bucket, bound in zip(buckets, self._bounds, strict=True):
            up_to = bisect_right(in_order, bound, done)
            if up_to > done:
                self._numbers.add(bucket, up_to - done)
            if up_to == len(in_order):
                break
            done = up_to
        self._numbers.add(total, sum(in_order))

    def _begin(self, values: tuple[str, ...]) -> None:
        """Have all buckets, also those without a value yet."""
        metric, text, labels = self._of_all
        self._keys[values] = [
            *(
                mmap_key(metric, f"{metric}_bucket", [*labels, "le"], [*values, str(bound)], text)
                for bound in map(float, self._bounds)
            ),
            mmap_key(metric, f"{metric}_sum", list(labels), list(values), text),
        ]
        for key in self._keys[values]:
            self._numbers.add(key, 0)


class InFiles:
    """What processes have written into the files of a folder; our metrics alone."""

    def __init__(self, folder: Path) -> None:
        self._collector = MultiProcessCollector(None, str(folder))

    def collect(self) -> Iterable[Metric]:
        return [metric for metric in self._collector.collect() if metric.name.startswith(PREFIX)]


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
        with self._file.open("a+", encoding="ascii", errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            self._known.update(_readable(text))
            if len(self._known) < self._most and name not in self._known:
                file.write("\n" * (text[-1:] not in {"", "\n"}) + json.dumps(name) + "\n")
                file.flush()
                self._known.add(name)


def _readable(lines: str) -> Iterable[str]:
    """Yield the names; not those of which a full disk has a part only."""
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)
