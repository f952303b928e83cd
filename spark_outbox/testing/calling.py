"""Call one handler by itself, with an event as a worker would make it."""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from typing import Any

from django.db import transaction

from spark_outbox.emitting.emit import prepare
from spark_outbox.events.event import Event, StoredRow
from spark_outbox.events.references import References
from spark_outbox.registry.handlers import Handler, HandlerFunction, Registry, registry
from spark_outbox.store import testing
from spark_outbox.worker.isolation import Isolation

AnyHandler = HandlerFunction | str
"""A handler's function, or its name."""


def registered(handler: AnyHandler) -> list[Handler]:
    """Return what is registered of a function, which may have several patterns, or under a name."""
    found = [each for each in registry.handlers if handler == each.name or _is(each.function, handler)]
    inner = getattr(handler, "__wrapped__", None)  # it was decorated after it had been registered
    return found if found or inner is None else registered(inner)


def _is(function: Callable[..., Any], other: object) -> bool:
    """Return whether they are the same, but for what `functools.wraps` has put around it."""
    return bool(inspect.unwrap(function, stop=lambda each: each == other) == other)


def find(handler: AnyHandler, group: str | None = None) -> Handler:
    """Return the handler that is registered for `group`; a function need not be registered at all."""
    found = registered(handler)
    if not found and callable(handler):
        return Registry().add_handler(handler, group="")
    if not found:
        raise ValueError(f"There is no handler of the name {handler!r}.")
    for each in found:
        if group is None or each.pattern.search(group):
            return each
    pattern = found[0].pattern.pattern
    raise ValueError(f"{found[0].name} is for groups like {pattern!r}, not for {group!r}.")


def group_of(handler: Handler) -> str:
    """Return a group that the handler matches."""
    pattern = handler.pattern.pattern
    plain = pattern.removeprefix("^").removesuffix("$").removesuffix(r"\Z")
    for group in (plain, "test"):
        if group and handler.pattern.search(group):
            return group
    raise ValueError(f"{handler.name} is for groups like {pattern!r}: say which, with group=…")


def argument(handler: Handler, event: Event, *, attempt: int) -> Event | list[Event]:
    """Return what a worker would call the handler with, of what `emit` stores. Raises
    UnstorableValue."""
    row = prepare(event)
    created = int((event.created_at.timestamp() if event.created_at else time.time()) * 1_000_000)
    parts = (row.key, row.group, row.payload, row.headers, row.ordering_key)
    made = Event.from_row(StoredRow(event.id, *parts, attempt - 1, created, None), References())
    if handler.is_async:
        made.load()  # while queries are possible
    return made if handler.batch is None else [made]


def call(handler: Handler, event: Event, *, attempt: int, using: str) -> None:
    """Call the handler, in a transaction unless it is a kind that has none. Raises what it raises."""
    given = argument(handler, event, attempt=attempt)
    with nullcontext() if handler.kind.outlives else shared(handler, using=using):
        run(handler, given)


def run(handler: Handler, given: Event | list[Event]) -> None:
    """Call the handler in a copy of the context: a language that it activates ends with it."""
    copy_context().run(handler.call, given)


@contextmanager
def shared(handler: Handler, *, using: str) -> Iterator[None]:
    """Have the handler share a transaction in the block, as with a worker. Its writes are rolled back if
    the block raises, or if they could not be committed: with BrokenTransaction, or IntegrityError."""
    # Two blocks: at the end of an outermost one Isolation would log what on_commit callbacks raise.
    with (
        transaction.atomic(using=using),
        transaction.atomic(using=using),
        Isolation(using, References(), strict=False, apart=None) as isolation,
    ):
        isolation.begin(handler.name)
        try:
            yield
            isolation.end()
        except BaseException:
            isolation.undo()
            raise
        testing.check_constraints(using=using)
