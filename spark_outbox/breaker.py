"""The circuit breakers: leave alone for a while what fails on one event after the other. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_PAUSE = 5.0
LONGEST_PAUSE = 300.0


@dataclass(slots=True)
class _Circuit:
    events: set[int] = field(default_factory=set)  # on which it failed, since it last succeeded
    pause: float = 0.0
    opened_until: float = 0.0
    probing: bool = False


class Breakers:
    """One worker's, for all of its handlers, by name.

    After `threshold` failures in a row of different events a handler's circuit is open: it is not
    called, for a pause that grows from 5 s to 5 minutes. The first call after that is the probe: if
    it succeeds the circuit is closed, if it fails it is open for twice as long.
    """

    def __init__(self, threshold: int | None, clock: Callable[[], float]) -> None:
        self._threshold = threshold
        self._clock = clock
        self._circuits: dict[str, _Circuit] = {}
        self.any = False
        """Something has failed lately; if not, there is nothing to ask, and nothing to tell."""

    def remaining(self, name: str) -> float:
        """Return the seconds for which the handler is not to be called; 0 if it may be, now.

        The first that may is the probe: until something is known of it, no other may.
        """
        circuit = self._circuits.get(name)
        if circuit is None or not circuit.pause:
            return 0.0
        now = self._clock()
        wait = max(0.0, circuit.opened_until - now)
        if not wait:
            circuit.opened_until = now + FIRST_PAUSE
            circuit.probing = True
        return wait

    def succeeded(self, name: str) -> bool:
        """Close the handler's circuit; return whether it was open."""
        circuit = self._circuits.pop(name, None)
        self.any = bool(self._circuits)
        return circuit is not None and circuit.pause > 0

    def failed(self, name: str, event_id: int) -> float:
        """Count a failure; return the seconds for which this opens the circuit, or 0."""
        if self._threshold is None:
            return 0.0
        circuit = self._circuits.setdefault(name, _Circuit())
        self.any = True
        circuit.events.add(event_id)
        if circuit.pause and not circuit.probing:  # it was called before the circuit opened
            return 0.0
        if not circuit.pause and len(circuit.events) < self._threshold:
            return 0.0
        circuit.probing = False
        circuit.pause = min(LONGEST_PAUSE, circuit.pause * 2 or FIRST_PAUSE)
        circuit.opened_until = self._clock() + circuit.pause
        circuit.events.clear()
        return circuit.pause
