"""Books the crash of a worker process, in a process of its own: the supervisor does not use the
database."""

import logging
import os
import signal
from collections.abc import Callable
from functools import partial

from spark_outbox.processes.fork import SIGNALS, STOPS, Pipes, be_process, name_process, signals_blocked
from spark_outbox.processes.place import Booking, InHand
from spark_outbox.processes.slot import Slot

logger = logging.getLogger(__name__)


BOOKING_PATIENCE = 30.0
"""The most seconds that the booking of a crash may take."""


def book(
    slot: Slot, write: Callable[[InHand, int], None], patience: float, pipes: Pipes
) -> Booking | None:
    """Start a process that calls `write` with what the dead process had in hand, and its session.

    It ignores signals to stop, and has BOOKING_PATIENCE, or `patience` if that is less.
    Returns None if there can be no process.
    """
    with signals_blocked():
        try:
            pid = os.fork()
        except OSError as refused:
            logger.error("A crash could not be counted: %(error)s.", {"error": refused.strerror})
            return None
        if not pid:
            be_process(partial(_write, slot, write, patience, pipes))
    return Booking(pid, slot.in_hand())


def _write(slot: Slot, write: Callable[[InHand, int], None], patience: float, pipes: Pipes) -> int:
    pipes.leave_parent()
    name_process("spark_booking")
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends this process in any state
    signal.setitimer(signal.ITIMER_REAL, min(BOOKING_PATIENCE, patience))
    write(slot.in_hand(), slot.session())
    return 0


def booked(booking: Booking, code: int) -> None:
    """Log if the process that booked a crash ran out of time."""
    if code == -signal.SIGALRM:
        context = {"event_id": booking.in_hand[0][0]}
        logger.error(
            "A crash on event %(event_id)s could not be counted: The database does not answer.",
            context,
            extra=context,
        )
