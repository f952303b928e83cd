"""The memory that a worker process shares with its supervisor: notes of the one, read by the other.

A note is a word or two, written in place. So the supervisor can read it whatever the process is at, and
also after it has died.
"""

import mmap
import time

NEVER = float("inf")

_SIZE = 16 * mmap.PAGESIZE
_ROOM = (_SIZE // 8 - 5) // 2  # pairs of words, beside their count and the four at the end
_ASKED, _DUE, _READY, _SESSION = -1, -2, -3, -4


class Slot:
    """The notes of one child process. `number` is that of its place, from 0."""

    def __init__(self, number: int) -> None:
        self.number = number
        memory = mmap.mmap(-1, _SIZE)
        # How many calls are in hand, and then their events and handlers. At _READY, whether the child
        # has been ready. At _SESSION, the number of its session.
        self._words = memoryview(memory).cast("q")
        # The same memory. At _ASKED, when the child began to wait for the database. At _DUE, when what
        # it does has to end.
        self._times = memoryview(memory).cast("d")
        self._times[_DUE] = NEVER
        self.put_down()

    # The child writes

    def take_in_hand(self, *called: tuple[int, int]) -> None:
        """Note what is about to be called: ids of events, and the numbers of their handlers."""
        words = self._words
        if len(called) == 1:
            words[1], words[2] = called[0]
            words[0] = 1
            return
        self.put_down()
        for number, pair in enumerate(called[:_ROOM]):
            words[2 * number + 1], words[2 * number + 2] = pair
        words[0] = len(called[:_ROOM])

    def put_down(self) -> None:
        """Note that nothing is in hand, and that from now on the database has to answer."""
        self._times[_ASKED] = time.monotonic()
        self._words[0] = 0

    def rest(self) -> None:
        """Note that nobody has to answer, until `put_down`."""
        self._times[_ASKED] = NEVER

    def end_by(self, deadline: float) -> None:
        """Note when the current call has to end, on the monotonic clock; NEVER lifts it."""
        self._times[_DUE] = deadline

    def be_ready(self) -> None:
        self._words[_READY] = 1

    def identify(self, session: int) -> None:
        """Note the session that running deliveries of this worker bear."""
        self._words[_SESSION] = session

    # The supervisor reads

    def in_hand(self) -> list[tuple[int, int]]:
        words = self._words[1 : 2 * self._words[0] + 1].tolist()
        return list(zip(words[::2], words[1::2], strict=True))

    def waits_since(self) -> float:
        """Return when the child began to wait for the database; infinity if it does not wait."""
        return NEVER if self._words[0] else float(self._times[_ASKED])

    def due(self) -> float:
        """Return when what the child does has to end."""
        return float(self._times[_DUE])

    def has_been_ready(self) -> bool:
        return bool(self._words[_READY])

    def session(self) -> int:
        """Return the child's session; 0 if it had none."""
        return int(self._words[_SESSION])
