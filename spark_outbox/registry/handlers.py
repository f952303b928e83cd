"""The registry of handlers, by pattern, and sources, by model. Filled at import; runs no SQL."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeGuard

from asgiref.sync import async_to_sync
from django.db.models import Model

from spark_outbox.errors import RegistrationError
from spark_outbox.events.event import MAX_LENGTH, Event
from spark_outbox.registry import callables
from spark_outbox.registry.policy import Policy

HandlerFunction = Callable[[Any], object]
"""Takes an Event, or a list of them. Its result is ignored; a coroutine is awaited."""
SourceFunction = Callable[[Any], Iterable[Event | Mapping[str, Any]] | None]

_MATCHED_GROUPS = 1024  # groups come from the database: the cache must not grow with them


class Kind(Enum):
    """How a worker calls a handler."""

    PLAIN = "with one event, in the batch's transaction, before the next event's turn"
    LIST = "with several events, in the batch's transaction"
    ASYNC = "on the event loop, beside other calls; it may outlive the batch"
    DETACHED = "after the commit, in no transaction of the worker's"

    @property
    def outlives(self) -> bool:
        """Its calls may outlive the batch's transaction: then other workers can take over its
        deliveries."""
        return self in {Kind.ASYNC, Kind.DETACHED}


@dataclass(frozen=True, slots=True)
class Handler:
    """A function for the events whose group matches a pattern, under the name of its deliveries."""

    name: str
    pattern: re.Pattern[str]
    function: HandlerFunction
    policy: Policy
    number: int = 0
    """Its place among the registered, from 0."""
    batch: int | None = None
    """The most events that it takes at once, in a list; None for one, as itself."""
    kind: Kind = Kind.PLAIN
    is_async: bool = False
    """Its function is a coroutine function. A detached handler's may be one, too."""
    adapt: Callable[[Event], Any] | None = None
    """What is made of an event for the function; None if it takes the event itself."""
    start: HandlerFunction = field(init=False)
    """Calls the function, adapted; if that is async, it returns the coroutine."""
    call: HandlerFunction = field(init=False)
    """Runs the function in this thread to its end, also if it is async."""

    def __post_init__(self) -> None:
        start: Any = self.function if self.adapt is None else self._adapted(self.adapt)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "call", async_to_sync(start) if self.is_async else start)

    def _adapted(self, adapt: Callable[[Event], Any]) -> HandlerFunction:
        function: Any = self.function

        async def start(event: Event) -> None:
            await function(adapt(event))

        return start if self.is_async else lambda event: function(adapt(event))


class Matching(tuple[Handler, ...]):
    """The handlers that match a group, in registration order."""

    are_plain: bool

    def __new__(cls, handlers: Iterable[Handler]) -> "Matching":
        made = super().__new__(cls, handlers)
        made.are_plain = all(handler.kind is Kind.PLAIN for handler in made)
        return made


class Registry:
    """Handlers in registration order, and sources by model."""

    def __init__(self) -> None:
        self.handlers: list[Handler] = []
        self.sources: dict[type[Model], list[SourceFunction]] = {}
        self._matches: dict[str, Matching] = {}

    def clear(self) -> None:
        """Forget all handlers and sources."""
        self.handlers.clear()
        self.sources.clear()
        self._matches.clear()

    def arrange(self, handlers: Iterable[Handler]) -> None:
        """Have these handlers alone, in this order."""
        self.handlers[:] = [replace(each, number=number) for number, each in enumerate(handlers)]
        self._matches.clear()

    def add_handler(
        self,
        function: HandlerFunction,
        *,
        group: str,
        name: str | None = None,
        policy: Policy | None = None,
        batch: int | None = None,
        atomic: bool = True,
        adapt: Callable[[Event], Any] | None = None,
    ) -> Handler:
        """Register `function` for the groups in which `re.search` finds `group`.

        The name defaults to the function's dotted path. A function that is registered for a second
        pattern has its pattern in the name, too. Raises RegistrationError for a pattern that does
        not compile, and for a name that is taken.
        """
        if not callable(function):
            raise RegistrationError(f"A handler must be callable; {function!r} is not.")
        if callables.is_generator(function):
            raise RegistrationError(
                f"{function!r} is a generator: calling it would not run it. Write a function without "
                "yield."
            )
        is_async = callables.is_async(function)
        if batch is not None and (type(batch) is not int or batch < 1):
            raise RegistrationError(f"batch is the most events of a list, 1 or more, not {batch!r}.")
        if batch is not None and (is_async or not atomic):
            raise RegistrationError(
                "A handler with batch=… shares the worker's transaction: it can be neither async nor "
                "have atomic=False."
            )
        callables.check_argument(function, "the event" if batch is None else "the list of events")
        callables.check_annotation(function, batch)
        try:
            pattern = re.compile(group)
        except (re.error, TypeError) as error:
            raise RegistrationError(
                f"The pattern {group!r} of {function!r} does not compile: {error}."
            ) from error
        if name is None:
            name = callables.dotted_path(function)
            if any(h.name == name and h.function == function for h in self.handlers):
                name = f"{name}:{group}"
        if not isinstance(name, str) or not 0 < len(name) <= MAX_LENGTH:
            raise RegistrationError(
                f"A handler's name has 1 to {MAX_LENGTH} characters: {name!r}. "
                "Give it another with name=…"
            )
        if any(handler.name == name for handler in self.handlers):
            raise RegistrationError(
                f"There is a handler {name!r} already. Deliveries are stored by handler name: "
                "give this one another with name=…"
            )
        number = len(self.handlers)
        policy = policy or Policy()
        kind = Kind.PLAIN if batch is None else Kind.LIST
        if is_async:
            kind = Kind.ASYNC
        if not atomic:
            kind = Kind.DETACHED
        handler = Handler(name, pattern, function, policy, number, batch, kind, is_async, adapt)
        self.handlers.append(handler)
        self._matches.clear()
        return handler

    def replace(self, handler: Handler) -> None:
        """Put `handler` in the place of the one that is registered under its name."""
        names = [each.name for each in self.handlers]
        self.handlers[names.index(handler.name)] = handler
        self._matches.clear()

    def add_source(
        self,
        function: SourceFunction,
        *,
        model: type[Model],
        adapt: Callable[[Any], Event] | None = None,
        on_save: bool = True,
    ) -> None:
        """Register `function` for saved instances of `model`, and for the sweep over all of them.

        `adapt` makes an event of what it yields. Without `on_save` only the sweep calls it.
        """
        if not is_model(model):
            raise RegistrationError(f"A source needs a model class, not {model!r}.")
        if not callable(function):
            raise RegistrationError(f"A source must be callable; {function!r} is not.")
        if callables.is_async(function):
            raise RegistrationError(
                f"{function!r} is async, but a source is called by save(). Write a plain function."
            )
        callables.check_argument(function, "the instance")
        sources = self.sources.setdefault(model, [])
        if function in sources:
            raise RegistrationError(
                f"{callables.path_of(function)} is a source of {model._meta.label} already."
            )
        if adapt is not None or not on_save:
            kind = callables.Adapted if on_save else callables.Swept
            function = kind(function, adapt)
        sources.append(function)

    def handlers_for(self, group: str) -> Matching:
        """Return the handlers that match `group`, in registration order."""
        try:
            return self._matches[group]
        except KeyError:
            pass
        if len(self._matches) >= _MATCHED_GROUPS:
            self._matches.clear()
        found = Matching(handler for handler in self.handlers if handler.pattern.search(group))
        self._matches[group] = found
        return found


registry = Registry()


def is_model(model: object) -> TypeGuard[type[Model]]:
    """Return whether `model` is a model class, abstract or not, but not Model itself."""
    return isinstance(model, type) and issubclass(model, Model) and hasattr(model, "_meta")
