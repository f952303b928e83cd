"""Processes that a handler forks: they leave the worker's connections and its signals alone.

A connection ends when the last process that has its socket is gone. So a handler's child would keep the
transaction of a worker that is killed, with its row locks, for as long as the child lives. And its own
queries would end up between those of the worker. `multiprocessing` with "fork" makes such children; a
program that is executed has no socket of ours.
"""

import os
import weakref
from typing import Any

import psycopg
from django.db import connections
from django.db.backends.signals import connection_created

from spark_outbox.processes.fork import default_signals

_known: "weakref.WeakSet[psycopg.Connection[Any]]" = weakref.WeakSet()
_left: list[object] = []


def watch() -> None:
    """From now on, close connections of this process in those that it forks. Call it once."""
    connection_created.connect(_on_connect, dispatch_uid="spark_outbox.forks")
    os.register_at_fork(after_in_child=_leave_parent)


def leave(connection: "psycopg.Connection[Any]") -> None:
    """Have forked processes leave a connection alone that is none of Django's."""
    _known.add(connection)


def _on_connect(connection: Any, **_: Any) -> None:
    if isinstance(connection.connection, psycopg.Connection):  # there may be other databases
        leave(connection.connection)


def _leave_parent() -> None:
    """In the child, just after the fork: have Django connect anew, and signals do what they do."""
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for connection in list(_known):
        if not connection.closed:
            # Not closed: libpq would say goodbye for the worker, and later write to a file that has got
            # its number.
            os.dup2(nowhere, connection.fileno(), inheritable=False)
    os.close(nowhere)
    _left.extend(_known)
    for wrapper in connections.all(initialized_only=True):
        _left.append(wrapper)
        del connections[wrapper.alias]
    default_signals()
