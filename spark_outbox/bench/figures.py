"""Figures, their goals, and the interleaved runs whose medians they are."""

import operator
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from spark_outbox.bench.scratch import Scratch

Run = Callable[[], float | tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Goal:
    """The bound of a figure's ratio; or, if it has no baseline, of its value."""

    sign: str
    bound: float

    def is_met(self, number: float) -> bool:
        compare = {">=": operator.ge, "<=": operator.le, "<": operator.lt}[self.sign]
        return bool(compare(number, self.bound))

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    goal: Goal | None = None

    @property
    def ratio(self) -> float | None:
        return self.value / self.baseline if self.baseline else None

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.goal.is_met(self.value if self.ratio is None else self.ratio)

    def as_dict(self) -> dict[str, Any]:
        goal = None if self.goal is None else str(self.goal)
        return {**asdict(self), "ratio": self.ratio, "goal": goal, "met": self.met}


class Bench:
    """The argument of each measurement: the database, the number of rounds, and their size."""

    def __init__(self, scratch: Scratch, near: str, *, quick: bool, say: Callable[[str], None]) -> None:
        self.scratch = scratch
        self.near = near
        self.quick = quick
        self.rounds = 2 if quick else 5
        self._say = say

    def size(self, full: int) -> int:
        """Return the number of events or rows to use: `full`, or less with --quick."""
        return max(100, full // 20) if self.quick else full

    def seconds(self, full: float) -> float:
        """Return the duration to use, in seconds: `full`, or less with --quick."""
        return full / 10 if self.quick else full

    def medians(self, *runs: Run) -> list[float]:
        """Call all runs in turn, once in each round; return the median of each number that they
        return, in their order."""
        found: list[list[tuple[float, ...]]] = [[] for _ in runs]
        for number in range(self.rounds):
            for run, results in zip(runs, found, strict=True):
                self._say(f"round {number + 1} of {self.rounds}")
                result = run()
                results.append(result if isinstance(result, tuple) else (result,))
        return [
            statistics.median(numbers) for results in found for numbers in zip(*results, strict=True)
        ]


Measure = Callable[[Bench], list[Figure]]
MEASURES: dict[str, Measure] = {}
"""All measurements by name, in the order in which they run."""


def measure(function: Measure) -> Measure:
    MEASURES[function.__name__] = function
    return function


def percentile(values: list[float], share: float) -> float:
    """Return the value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
