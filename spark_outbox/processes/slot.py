"""The memory that a worker process shares with its supervisor. Each note has one writer.

A note is a word or two, written in place. So the supervisor can read it at any moment, also after the
process has died.
"""

import mmap
import time
from collections.abc import Sequence

NEVER = float("inf")

_SIZE = 16 * mmap.PAGESIZE
_ASKED, _DUE, _BACK, _READY, _UP, _SESSION, _IDLE, _WATCH, _HANDLED, _FAILED = range(-10, 0)
_ROOM = (_SIZE // 8 - 12) // 4  # pairs in each of two lists, beside their counts and ten more words
_UNDER_WAY = 2 * _ROOM + 1  # where the second list begins


class Slot:
    """The notes of one child process. `number` is that of its place, from 0."""

    def __init__(self, number: int) -> None:
        self.number = number
        memory = mmap.mmap(-1, _SIZE)
        # The number of current calls, then their events and handlers; at _UNDER_WAY the same of async
        # calls that go on. At _READY, whether the child has been ready; at _UP, whether it has the
        # database. At _SESSION, the number of its session. At _IDLE, whether it has nothing to do; at
        # _WATCH, whether it has the watch, which the supervisor writes. At _HANDLED and _FAILED, how
        # many events it has settled, and how many of them failed.
        self._words = memoryview(memory).cast("q")
        # The same memory. At _ASKED, when the child began to wait for the database. At _DUE, its
        # deadline. At _BACK, by when it is back if it rests.
        self._times = memoryview(memory).cast("d")
        self._times[_DUE] = NEVER
        self.put_down()

    # The child writes

    def take_in_hand(self, *called: tuple[int, int]) -> None:
        """Note the current calls: ids of events, and the numbers of their handlers."""
        words = self._words
        if len(called) == 1:
            words[1], words[2] = called[0]
            words[0] = 1
            return
        self.put_down()
        self._write(0, called)

    def keep(self, *called: tuple[int, int]) -> None:
        """Note the async calls that are under way, for people."""
        self._write(_UNDER_WAY, called)

    def _write(self, place: int, called: Sequence[tuple[int, int]]) -> None:
        """Write calls, and then how many; nobody sees a list that is half written."""
        words = self._words
        words[place] = 0
        for number, pair in enumerate(called[:_ROOM]):
            first = place + 2 * number + 1
            words[first], words[first + 1] = pair
        words[place] = len(called[:_ROOM])

    def put_down(self) -> None:
        """Note that there is no current call, and start the answer timeout of the database."""
        self._times[_ASKED] = time.monotonic()
        self._words[0] = 0

    def rest(self, seconds: float = NEVER) -> None:
        """Pause the answer timeout until `put_down()`, which comes within `seconds`."""
        self._times[_BACK] = time.monotonic() + seconds
        self._times[_ASKED] = NEVER

    def end_by(self, deadline: float) -> None:
        """Note the deadline of the current call, on the monotonic clock; NEVER means none."""
        self._times[_DUE] = deadline

    def be_ready(self) -> None:
        self._words[_READY] = self._words[_UP] = 1

    def lose_database(self) -> None:
        self._words[_UP] = 0

    def tally(self, handled: int, failed: int) -> None:
        """Add to the numbers of events that were settled, and of those that failed for good."""
        self._words[_HANDLED] += handled
        self._words[_FAILED] += failed

    def identify(self, session: int) -> None:
        """Note the session that is stored in this worker's running deliveries."""
        self._words[_SESSION] = session

    def be_idle(self, idle: bool) -> None:
        self._words[_IDLE] = idle

    def has_watch(self) -> bool:
        return bool(self._words[_WATCH])

    # The supervisor reads

    def in_hand(self) -> list[tuple[int, int]]:
        return self._read(0)

    def under_way(self) -> list[tuple[int, int]]:
        """Return the current calls, and async ones that go on."""
        return list(dict.fromkeys([*self.in_hand(), *self._read(_UNDER_WAY)]))

    def _read(self, place: int) -> list[tuple[int, int]]:
        words = self._words[place + 1 : place + 1 + 2 * self._words[place]].tolist()
        return list(zip(words[::2], words[1::2], strict=True))

    def _rests(self) -> bool:
        return bool(self._times[_ASKED] == NEVER and not self._words[0])

    def runs_callbacks(self) -> bool:
        """Return whether the child runs callbacks after a commit, which take what they take."""
        return self._rests() and self._times[_BACK] == NEVER

    def waits_since(self) -> float:
        """Return when the child began to wait for the database; infinity if it does not wait."""
        return NEVER if self._words[0] else float(self._times[_ASKED])

    def due(self) -> float:
        """Return the child's deadline; NEVER if it has none."""
        return float(self._times[_DUE])

    def back_by(self) -> float:
        """Return by when the child does something again; NEVER if nobody knows."""
        return float(self._times[_BACK]) if self._rests() else NEVER

    def has_been_ready(self) -> bool:
        return bool(self._words[_READY])

    def has_database(self) -> bool:
        return bool(self._words[_UP])

    def tallies(self) -> tuple[int, int]:
        """Return how many events it has settled, and how many of them failed for good."""
        return self._words[_HANDLED], self._words[_FAILED]

    def is_idle(self) -> bool:
        return bool(self._words[_IDLE])

    def give_watch(self, given: bool) -> None:
        self._words[_WATCH] = given

    def session(self) -> int:
        """Return the child's session; 0 if it had none."""
        return int(self._words[_SESSION])
