"""The context of a worker: everything that its parts share and never change."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

from django.db import DEFAULT_DB_ALIAS

from spark_outbox import conf
from spark_outbox.conf import Settings
from spark_outbox.events.event import Event
from spark_outbox.processes.guard import CallGuard, Unguarded
from spark_outbox.processes.watch import OwnWatch, Watch
from spark_outbox.registry.handlers import Handler, Registry, registry
from spark_outbox.worker.breaker import Breakers
from spark_outbox.worker.pauses import Pauses

OnError = Callable[[Event, Handler, BaseException], None]


class Experience:
    """Knowledge about one database that workers of this process share, also between threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = conf.current()
        self.breakers = Breakers(self.settings.BREAK_AFTER, clock)
        self.pauses = Pauses(clock)
        self.slow: dict[str, float] = {}
        """By name, the recent seconds of handlers that outlast the commit interval."""
        self.apart: set[str] = set()
        """Names of handlers whose savepoints are sent ahead, see savepoints.py."""
        self.passed_over: set[int] = set()
        """Events whose rows PostgreSQL refuses to change, to whatever end."""

    def note_duration(self, name: str, seconds: float, commit_interval: float) -> None:
        if seconds > commit_interval or name in self.slow:
            recent = (self.slow.get(name, seconds) + seconds) / 2
            self.slow[name] = recent
            if recent < commit_interval:
                self.slow.pop(name, None)


class Stop:
    """Whether the worker is to stop. A signal handler may set it."""

    is_set = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    using: str
    """The alias of the worker's database."""
    direct: str | None
    """The alias of a connection to it that is no pooler's: its own, or another. None if there is
    none."""
    groups: str | None
    """A PostgreSQL regular expression: the worker leaves other groups to others."""
    settings: Settings
    """With the options of the command."""
    registry: Registry
    clock: Callable[[], float]
    guard: CallGuard
    """Interrupts handlers, and notes the current calls."""
    watch: Watch
    """Says whether it is this worker that looks out for events when it has none."""
    experience: Experience
    needs_keys: bool
    """It must not start before the outbox knows the keys that django-spark has handled."""
    on_ready: Callable[[str], None] | None
    """Called with the server's version whenever a new session is prepared and LISTENs."""
    on_error: OnError | None
    stop: Stop

    @property
    def is_direct(self) -> bool:
        """The worker's own connection is no pooler's."""
        return self.direct == self.using


class Options(TypedDict, total=False):
    """The options of a worker. Numbers default to the settings."""

    using: str
    groups: str | None
    batch_size: int | None
    commit_interval: float | None
    poll_interval: float | None
    async_concurrency: int | None
    registry: Registry
    clock: Callable[[], float]
    guard: CallGuard | None
    watch: Watch
    on_ready: Callable[[str], None] | None
    on_error: OnError | None
    experience: Experience | None
    needs_keys: bool


_SETTINGS = ("batch_size", "commit_interval", "poll_interval", "async_concurrency")


def make_context(**options: Unpack[Options]) -> Context:
    """Return the context of a new worker. Raises SettingsError."""
    settings = conf.current()
    given: dict[str, Any] = {name.upper(): options.get(name) for name in _SETTINGS}
    given = {name: value for name, value in given.items() if value}
    using = options.get("using", DEFAULT_DB_ALIAS)
    clock = options.get("clock", time.monotonic)
    return Context(
        using=using,
        direct=settings.direct(using),
        groups=options.get("groups"),
        settings=replace(settings, **given) if given else settings,
        registry=options.get("registry", registry),
        clock=clock,
        guard=options.get("guard") or Unguarded(),
        watch=options.get("watch") or OwnWatch(),
        experience=options.get("experience") or Experience(clock),
        needs_keys=options.get("needs_keys", False),
        on_ready=options.get("on_ready"),
        on_error=options.get("on_error"),
        stop=Stop(),
    )
