"""The exceptions of spark_outbox. Database errors pass through unwrapped.

SparkOutboxError
├── SettingsError         SPARK_OUTBOX has an invalid setting
├── NotMigrated           the database has no outbox, or lacks the keys that django-spark has handled
├── RegistrationError     a handler or source can't be registered
├── SourceError           a source raises it to have a sweep print what is wrong
├── EmitError             nothing was written
│   ├── InvalidEvent      the group, the key or an option is not acceptable
│   ├── UnstorableValue   a payload value can't be stored; names its path and the cure
│   ├── NotInTransaction  REQUIRE_ATOMIC is set and there is no transaction
│   ├── DuplicateKey      the key exists, and on_duplicate forbids it
│   └── IdCollision       another event has the id: the sequence is behind the table
└── HandlingError         raised inside a handler
    ├── Retry             a handler raises it to be called again later
    ├── Discard           a handler raises it to give an event up: no retry, no failure
    ├── BatchFailed       a batch handler raises it to fail some of its events
    ├── UnreadablePayload the stored payload is not one that emit() writes
    ├── WorkerDied        the worker process died during the call; only recorded, never raised
    ├── ConnectionLost    the connection was lost in several calls in a row; only recorded, too
    ├── NotSettled        PostgreSQL accepted the outbox's own UPDATE, but did not apply it
    ├── InstanceGone      the row that the payload refers to has been deleted
    └── BrokenTransaction the handler left the transaction in a state that can't be committed

KeyboardInterrupt
└── HandlerTimeout        the handler ran longer than its timeout
"""

import datetime as dt
from collections.abc import Iterable, Mapping
from traceback import extract_tb
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import InterfaceError, OperationalError, ProgrammingError


class SparkOutboxError(Exception):
    """Base of every exception that spark_outbox raises itself."""


class SettingsError(SparkOutboxError, ImproperlyConfigured):
    pass


class RegistrationError(SparkOutboxError, ValueError):
    pass


class NotMigrated(SparkOutboxError):
    pass


class SourceError(SparkOutboxError):
    """Raise it in a source to have `process_spark_sources` print its message, which must quote no data.

    Of other exceptions it prints the type and the place.
    """


class EmitError(SparkOutboxError):
    pass


class InvalidEvent(EmitError, ValueError):
    pass


class UnstorableValue(EmitError, TypeError):
    pass


class NotInTransaction(EmitError, RuntimeError):
    pass


class DuplicateKey(EmitError, ValueError):
    pass


class IdCollision(EmitError, RuntimeError):
    """Not an IntegrityError: code that catches its own duplicates must not swallow this one."""


class HandlingError(SparkOutboxError):
    pass


class Retry(HandlingError):
    """Raise it in a handler to be called again `after` a timedelta or seconds, or at a datetime.

    Without `after` the handler's backoff decides. It counts as an attempt.
    """

    def __init__(
        self, reason: str = "", *, after: dt.timedelta | dt.datetime | float | None = None
    ) -> None:
        super().__init__(reason)
        if isinstance(after, int | float):
            after = dt.timedelta(seconds=after)
        if not isinstance(after, dt.timedelta | dt.datetime | None):
            raise TypeError(f"after is a timedelta, seconds or a datetime, not {after!r}.")
        if isinstance(after, dt.datetime) and after.tzinfo is None:
            raise TypeError(f"after {after} has no time zone.")
        self.after = after


class Discard(HandlingError):
    """Raise it in a handler, with the reason, to give an event up: no retry, no failure."""


class BatchFailed(HandlingError):
    """Raise it in a handler with `batch=…` to fail some of its events: the keys of `errors`.

    Everything that the handler has written stays, for the sake of the other events. So wrap the writes
    of each event in `transaction.atomic()`.
    """

    def __init__(self, errors: Mapping[Any, BaseException]) -> None:
        super().__init__(f"{len(errors)} events failed.")
        if not errors or not all(isinstance(error, BaseException) for error in errors.values()):
            raise TypeError("BatchFailed takes a dict from the failed events to their exceptions.")
        self.errors = dict(errors)

    def check(self, events: Iterable[Any]) -> None:
        """Raise TypeError if `errors` has an event that is not in `events`, the handler's list."""
        if not self.errors.keys() <= set(events):
            raise TypeError(
                "BatchFailed is for handlers with batch=…, and its events must be in their list."
            ) from self


class UnreadablePayload(HandlingError, ValueError):
    pass


class WorkerDied(HandlingError):
    pass


class ConnectionLost(HandlingError):
    pass


class NotSettled(HandlingError, RuntimeError):
    pass


class InstanceGone(HandlingError, LookupError):
    pass


class BrokenTransaction(HandlingError, RuntimeError):
    pass


class HandlerTimeout(KeyboardInterrupt):
    """Raised inside a handler. Not an Exception, so `except Exception` does not catch it. Psycopg
    treats it like a Ctrl-C: it cancels the running query."""

    def __init__(self, message: str = "The handler ran longer than its timeout.") -> None:
        super().__init__(message)


QUOTES_NOTHING = (SourceError, UnstorableValue)
"""Errors whose message quotes no data. Of others `describe` tells what can be told."""


def describe(error: BaseException) -> str:
    """Describe an exception for a log, by its type and where it was raised.

    Its message can quote a payload or a row, so it is left out; except if the database can't be reached,
    or denies access.
    """
    kind = type(error).__qualname__
    sqlstate = str(getattr(error.__cause__, "sqlstate", None) or "")
    refused = isinstance(error, ProgrammingError) and sqlstate in {"42501", "42P01", "42883"}
    if refused or isinstance(error, InterfaceError | OperationalError):
        return f"{kind}: {error}".partition("\n")[0]  # DETAIL, on later lines, may quote rows
    if sqlstate:
        return f"{kind} {sqlstate}"
    places = extract_tb(error.__traceback__)
    return f"{kind} at {places[-1].filename}:{places[-1].lineno}" if places else kind
