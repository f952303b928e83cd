"""Handlers that give their process trouble: for tests with real worker processes, in EXTRA_APPS.

At the end of a process that has loaded them, a file with its number is made in ENDED_IN, if that is set.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import time
from pathlib import Path
from threading import Thread

from spark_outbox import Event, handler
from tests.challenges.models import Handled

_libc = ctypes.CDLL(None)


def wait_in_c() -> None:
    """Wait for a lock that nobody lets go, and look at no signal."""
    mutex = ctypes.create_string_buffer(64)
    _libc.pthread_mutex_init(mutex, None)
    for _ in range(2):
        _libc.pthread_mutex_lock(mutex)


@handler(r"^stuck_plain$", name="stuck plain", timeout=0.2, max_attempts=1)
def plain(event: Event) -> None:
    wait_in_c()


@handler(r"^stuck_list$", name="stuck list", timeout=0.2, max_attempts=1, batch=10)
def as_list(events: list[Event]) -> None:
    wait_in_c()


@handler(r"^stuck_detached$", name="stuck detached", timeout=0.2, max_attempts=1, atomic=False)
def detached(event: Event) -> None:
    wait_in_c()


@handler(r"^stuck_async$", name="stuck async", timeout=0.2, max_attempts=1)
async def concurrent(event: Event) -> None:
    wait_in_c()


@handler(r"^crash_list$", name="crash list", batch=10, retry_for=(OSError,), backoff=0.1)
def crash_in_list(events: list[Event]) -> None:
    for event in events:
        if event.key == "bad":
            ctypes.string_at(0)


def stay(event: Event) -> None:
    """Be the child of a handler: tell its process, and wait to be told to go."""
    Path(event["started"]).write_text(str(os.getpid()))
    while not Path(event["go"]).exists():
        time.sleep(0.005)


@handler(r"^forks$", name="forks")
def forks(event: Event) -> None:
    Handled.objects.create(key=event.key, handler="forks", note=str(os.getpid()))
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            stay(event)
        os._exit(0)
    os.waitpid(child, 0)


def write(key: str) -> None:
    Handled.objects.create(key=key, handler="child", note=str(os.getpid()))


@handler(r"^children$", name="children")
def children(event: Event) -> None:
    """Have one child write to the database, and terminate another one that would stay."""
    Handled.objects.create(key=event.key, handler="children", note=str(os.getpid()))
    forking = multiprocessing.get_context("fork")
    writing = forking.Process(target=write, args=(event.key,))
    staying = forking.Process(target=stay, args=(event,))
    writing.start()
    writing.join()
    staying.start()
    while not Path(event["started"]).exists():
        time.sleep(0.005)
    staying.terminate()
    staying.join()
    Handled.objects.create(key=event.key, handler="children", note=str(staying.exitcode))


def _note_end() -> None:
    if "ENDED_IN" in os.environ:
        (Path(os.environ["ENDED_IN"]) / str(os.getpid())).touch()


atexit.register(_note_end)


@handler(r"^leaves_a_thread$", name="leaves a thread")
def leave_a_thread(event: Event) -> None:
    """Leave a thread that is no daemon, and so is to come to its end."""

    def end() -> None:
        while not Path(event["go"]).exists():
            time.sleep(0.005)
        Path(event["ended"]).touch()

    Thread(target=end).start()
