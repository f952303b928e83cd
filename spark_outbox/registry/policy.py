"""Decides whether and when a handler that raised is called again. Pure."""

import datetime as dt
from dataclasses import dataclass

from spark_outbox import conf
from spark_outbox.errors import (
    Discard,
    InstanceGone,
    RegistrationError,
    Retry,
    UnreadablePayload,
)
from spark_outbox.registry import backoff
from spark_outbox.registry.backoff import MAX_DELAY, Backoff, Seconds, seconds

Exceptions = tuple[type[BaseException], ...]

HOPELESS: Exceptions = (InstanceGone, UnreadablePayload)
"""Errors that another attempt can't mend: payloads don't change, and deleted rows don't come back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The policy of one handler. For a field that is None the settings apply, read at each use.

    Raises RegistrationError for values that make no sense.
    """

    max_attempts: int | None = None
    backoff: Backoff | None = None
    retry_for: Exceptions = (BaseException,)
    discard_for: Exceptions = ()
    timeout: Seconds | None = None

    def __post_init__(self) -> None:
        if self.max_attempts is not None and (
            type(self.max_attempts) is not int or self.max_attempts < 1
        ):
            raise RegistrationError(f"max_attempts is 1 or more, not {self.max_attempts!r}.")
        if self.backoff is not None and not callable(self.backoff):
            try:
                delays = [backoff.delay(attempt, self.backoff) for attempt in (1, 2)]
            except (ArithmeticError, LookupError, TypeError, ValueError):
                delays = [-1.0]
            if min(delays) < 0:
                raise RegistrationError(
                    f"backoff is the seconds of the first delay, a list of delays, or a function of "
                    f"the attempt, not {self.backoff!r}."
                )
        if self.timeout is not None and (
            not isinstance(self.timeout, int | float | dt.timedelta) or seconds(self.timeout) <= 0
        ):
            raise RegistrationError(f"timeout is a number of seconds above 0, not {self.timeout!r}.")
        for name in ("retry_for", "discard_for"):
            kinds = getattr(self, name)
            if not isinstance(kinds, tuple) or not all(
                isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds
            ):
                raise RegistrationError(f"{name} is a tuple of exception classes, not {kinds!r}.")

    def limit(self) -> float | None:
        """Return the seconds that a call may take; None for no limit."""
        return conf.current().TIMEOUT if self.timeout is None else seconds(self.timeout)

    def is_final(self, error: BaseException) -> bool:
        """Return whether another attempt would be pointless. False for Retry and Discard: with these
        the handler itself decides."""
        if isinstance(error, (Retry, Discard)):
            return False
        return isinstance(error, self.discard_for) or self._is_hopeless(error)

    def is_exhausted(self, attempts: int) -> bool:
        """Return whether the handler has used up its attempts."""
        return attempts >= (self.max_attempts or conf.current().MAX_ATTEMPTS)

    def discards(self, error: BaseException) -> bool:
        """Return whether this error ends the handler's work on the event without a failure."""
        return isinstance(error, (Discard, *self.discard_for))

    def next_try(self, error: BaseException, attempt: int) -> dt.timedelta | dt.datetime | None:
        """Return when to try again after the failed `attempt` (1-based): after a delay, or at a time.
        None if there are no more attempts, or another would not help."""
        if self.is_exhausted(attempt):
            return None
        if isinstance(error, Retry) and isinstance(error.after, dt.datetime):
            return error.after
        if isinstance(error, Retry) and isinstance(error.after, dt.timedelta):
            return _bounded(error.after.total_seconds())
        if self._is_hopeless(error):
            return None
        settings = conf.current()
        wait = backoff.delay(
            attempt,
            settings.BACKOFF if self.backoff is None else self.backoff,
            longest=settings.MAX_BACKOFF,
        )
        return _bounded(wait)

    def _is_hopeless(self, error: BaseException) -> bool:
        return isinstance(error, HOPELESS) or not isinstance(error, (Retry, *self.retry_for))


def _bounded(wait: float) -> dt.timedelta:
    return dt.timedelta(seconds=min(max(0.0, wait), MAX_DELAY.total_seconds()))
