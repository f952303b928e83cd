"""The SPARK_OUTBOX setting as one frozen dataclass. The only module that reads django.conf.settings."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import cache
from typing import Any

from django.conf import settings as django_settings
from django.core.signals import setting_changed

from spark_outbox.errors import SettingsError

FINAL_STATES = ("done", "discarded", "failed", "unhandled")

LONGEST_RETENTION = 10**10
"""Seconds: about three centuries."""

Seconds = float | None
"""None means for ever."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long events are kept after they have ended, by state and group."""

    states: tuple[tuple[str, Seconds], ...] = (("done", 14 * 86_400.0), ("discarded", 14 * 86_400.0))
    """States that are not here are kept for ever."""
    groups: tuple[tuple[str, tuple[tuple[str, Seconds], ...]], ...] = ()
    """By pattern, what differs for groups that match; the first pattern counts."""

    def seconds(self, state: str, group: str) -> Seconds:
        for pattern, states in self.groups:
            if re.search(pattern, group):
                return dict(self.states + states).get(state)
        return dict(self.states).get(state)

    @property
    def shortest(self) -> float:
        """The seconds for which every done event is kept."""
        every = [self.states, *(states for _, states in self.groups)]
        return min([dict(states).get("done") or math.inf for states in every])

    @property
    def prunes(self) -> list[str]:
        """The states of which events may be pruned at all."""
        every = [self.states, *(states for _, states in self.groups)]
        return [state for state in FINAL_STATES if any(dict(states).get(state) for states in every)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Every setting with its default. Durations are seconds, or a timedelta."""

    WAKE: str = "gated"
    """How the trigger wakes sleeping workers: `gated`, `always`, or `never`. Applied by `migrate`."""

    DISPATCH: str = "worker"
    """Where events are handled: in a `worker`, or `on_commit`, in the emitting process."""

    REQUIRE_ATOMIC: bool = False
    """Whether emit() outside `transaction.atomic()` raises NotInTransaction."""

    MAX_ATTEMPTS: int = 20
    """How often a handler is called for an event before its delivery is `failed`."""

    BACKOFF: float = 1.0
    """Seconds before the second attempt, doubled for each further one, less up to half at random."""

    MAX_BACKOFF: float = 3600.0
    """The longest of these delays, in seconds."""

    TIMEOUT: float | None = None
    """Seconds that a call of a handler may take; None for no limit."""

    FAILED_HEAD: str = "block"
    """Whether a failed event blocks later events of its ordering key (`block`), or not (`skip`)."""

    BREAK_AFTER: int | None = 10
    """A handler that fails on this many events in a row is not called for a while; None: no limit."""

    BATCH_SIZE: int = 500
    """The most events that a worker locks at once."""

    COMMIT_INTERVAL: float = 0.05
    """Seconds after which a worker commits what it has handled and takes a new batch."""

    ASYNC_CONCURRENCY: int = 100
    """The most calls of async handlers that a worker process runs at the same time."""

    POLL_INTERVAL: float = 60.0
    """Seconds after which a sleeping worker looks for events even without a notification."""

    RETENTION: Retention = Retention()
    """How long events are kept after they have ended; then workers prune them. A dict from states to
    durations, where None keeps for ever. Its item "groups" is a dict from regular expressions to such
    dicts, or to a duration for all states. By default `done` and `discarded` are kept for 14 days,
    others for ever; instead of a dict, None keeps all for ever."""

    KEYS_RETENTION: float | None = None
    """How long a key is a duplicate after its event was emitted, if the event is pruned; None: for
    ever. A source that yields the key later is handled again."""

    REDACT: str | Sequence[str] = ()
    """What no command and no page shows: the names of values in payloads and headers, at any depth; or
    the dotted path of a function that gets a payload, or headers, and returns what may be shown."""

    ENVIRONMENT: str = ""
    """The name of this installation, which the dashboard shows, so that nobody takes it for another."""

    METRICS_TOKEN: str = field(default="", repr=False)
    """The bearer token that the view `spark_outbox.observing.views.metrics` takes, beside a login. It is
    never shown. "" means none."""

    LISTEN_DATABASE: str | Mapping[str, str | None] | None = ""
    """Alias of a direct connection for LISTEN, for workers behind a transaction pooler.
    "" means the worker's own connection. None means no LISTEN: the worker polls.
    With several outboxes, a dict from the alias of each outbox to such a value; the default is ""."""

    def __post_init__(self) -> None:
        for name in ("BACKOFF", "MAX_BACKOFF", "COMMIT_INTERVAL", "POLL_INTERVAL"):
            object.__setattr__(self, name, _seconds(name, getattr(self, name)))
        if self.TIMEOUT is not None:
            object.__setattr__(self, "TIMEOUT", _seconds("TIMEOUT", self.TIMEOUT))
        if self.KEYS_RETENTION is not None:
            seconds = _seconds("KEYS_RETENTION", self.KEYS_RETENTION, most=LONGEST_RETENTION)
            object.__setattr__(self, "KEYS_RETENTION", seconds)
        object.__setattr__(self, "RETENTION", _retention(self.RETENTION))
        _one_of("WAKE", self.WAKE, "gated", "always", "never")
        _one_of("FAILED_HEAD", self.FAILED_HEAD, "block", "skip")
        _one_of("DISPATCH", self.DISPATCH, "worker", "on_commit")
        if type(self.REQUIRE_ATOMIC) is not bool:
            raise _error("REQUIRE_ATOMIC", self.REQUIRE_ATOMIC, "True or False")
        for name in ("MAX_ATTEMPTS", "BATCH_SIZE", "ASYNC_CONCURRENCY"):
            _whole_number(name, getattr(self, name))
        if self.BREAK_AFTER is not None:
            _whole_number("BREAK_AFTER", self.BREAK_AFTER)
        if not isinstance(self.ENVIRONMENT, str):
            raise _error("ENVIRONMENT", self.ENVIRONMENT, "a text")
        is_path = isinstance(self.REDACT, str) and "." in self.REDACT  # and not one name, by mistake
        is_list = isinstance(self.REDACT, list | tuple) and all(isinstance(n, str) for n in self.REDACT)
        if not is_path and not is_list:
            raise _error("REDACT", self.REDACT, "a list of names, or the dotted path of a function")
        if not isinstance(self.METRICS_TOKEN, str):
            raise SettingsError("SPARK_OUTBOX['METRICS_TOKEN'] must be text.")  # and not be shown
        given = self.LISTEN_DATABASE
        each = [*given, *given.values()] if isinstance(given, Mapping) else [given]
        if not all(alias is None or isinstance(alias, str) for alias in each):
            raise _error(
                "LISTEN_DATABASE", given, "a database alias or None, or a dict of these by alias"
            )

    def direct(self, using: str) -> str | None:
        """Return the alias of a connection to `using` that passes no pooler; None if there is none."""
        given = self.LISTEN_DATABASE
        if isinstance(given, Mapping):
            given = given.get(using, "")
        return None if given is None else given or using

    @property
    def listen_aliases(self) -> list[str]:
        """The database aliases that LISTEN_DATABASE names."""
        given = self.LISTEN_DATABASE
        each = [*given, *given.values()] if isinstance(given, Mapping) else [given]
        return [alias for alias in each if alias]


@cache
def current() -> Settings:
    """Return the current settings. Raises SettingsError, which lists every problem."""
    given: Any = getattr(django_settings, "SPARK_OUTBOX", {})
    if not isinstance(given, dict):
        raise SettingsError(f"SPARK_OUTBOX must be a dict, not {type(given).__name__}.")
    known = [field.name for field in fields(Settings)]
    problems = []
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(str(name).upper(), known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known names: {', '.join(known)}."
            problems.append(f"SPARK_OUTBOX has no setting {name!r}. {hint}")
            continue
        try:
            Settings(**{name: value})
        except SettingsError as error:
            problems.append(str(error))
    if problems:
        raise SettingsError("\n".join(problems))
    return Settings(**given)


def debug() -> bool:
    return bool(django_settings.DEBUG)


def is_silenced(check: str) -> bool:
    """Return whether the project has silenced a system check."""
    return check in django_settings.SILENCED_SYSTEM_CHECKS


def use_tz() -> bool:
    return bool(django_settings.USE_TZ)


def wsgi_application() -> str | None:
    """Return the dotted path that `startproject` writes into the settings; None if there is none."""
    return getattr(django_settings, "WSGI_APPLICATION", None)


def _seconds(name: str, value: object, *, most: float = 10**8) -> float:
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
        raise _error(name, value, f"a number of seconds above 0 and below {most:,.0f}, or a timedelta")
    return float(value)


def _retention(given: object) -> Retention:
    if isinstance(given, Retention):
        return given
    if given is None:
        return Retention(())
    if not isinstance(given, Mapping):
        raise _error("RETENTION", given, "a dict from states to durations, or None")
    states = dict(given)
    patterns = states.pop("groups", {})
    if not isinstance(patterns, Mapping):
        raise _error("RETENTION", given, "a dict whose item 'groups' is a dict from patterns")
    groups = []
    for pattern, value in patterns.items():
        try:
            re.compile(pattern).search("")
        except (TypeError, re.error) as error:
            raise _error(
                "RETENTION", given, f"a dict of regular expressions: {pattern!r}: {error}"
            ) from None
        of_group = value if isinstance(value, Mapping) else dict.fromkeys(FINAL_STATES, value)
        groups.append((pattern, _durations(of_group)))
    merged = dict(Retention().states + _durations(states))
    return Retention(tuple(merged.items()), tuple(groups))


def _durations(states: Mapping[str, object]) -> tuple[tuple[str, Seconds], ...]:
    for state in states:
        if state not in FINAL_STATES:
            raise _error("RETENTION", dict(states), f"by state: {', '.join(FINAL_STATES)}")
    return tuple(
        (state, None if value is None else _seconds("RETENTION", value, most=LONGEST_RETENTION))
        for state, value in states.items()
    )


def _whole_number(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise _error(name, value, "a whole number, 1 or more")


def _one_of(name: str, value: object, *choices: str) -> None:
    if value not in choices:
        raise _error(name, value, " or ".join(map(repr, choices)))


def _error(name: str, value: object, wanted: str) -> SettingsError:
    return SettingsError(f"SPARK_OUTBOX[{name!r}] is {value!r}; it must be {wanted}.")


def _forget(*, setting: str, **_: object) -> None:
    if setting == "SPARK_OUTBOX":
        current.cache_clear()


setting_changed.connect(_forget, dispatch_uid="spark_outbox.conf")
