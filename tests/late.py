"""Settings under which a SIGTERM comes in the worst moment: just before a system call that waits.

Python has then looked for signals for the last time, and calls the handler when the call returns. The
environment's LATE says whose wait it is, the supervisor's or its child's.
"""

import ctypes
import functools
import itertools
import operator
import os
import select
import signal
from collections.abc import Callable
from typing import Any

from tests.settings import *  # noqa: F403

_SUPERVISOR = os.getpid()
_raise = functools.partial(getattr(ctypes.CDLL(None), "raise"), int(signal.SIGTERM))


def _after_a_signal(wait: Callable[..., Any], *arguments: Any) -> Any:
    """Call `wait` after the signal, with no step of the interpreter in between."""
    return list(map(operator.call, [_raise, functools.partial(wait, *arguments)]))[1]


_waits = itertools.count()  # the supervisor's first is for the child to be ready
_select, _poll = select.select, select.poll


def _late_select(*arguments: Any) -> Any:
    if os.environ["LATE"] == "supervisor" and os.getpid() == _SUPERVISOR and next(_waits) == 1:
        return _after_a_signal(_select, *arguments)
    return _select(*arguments)


class _LatePoll:
    def __init__(self) -> None:
        self._poll = _poll()
        self.register = self._poll.register

    def poll(self, *arguments: Any) -> Any:
        if os.environ["LATE"] == "child":
            return _after_a_signal(self._poll.poll, *arguments)
        return self._poll.poll(*arguments)


select.select = _late_select
select.poll = _LatePoll  # type: ignore[misc, assignment]
