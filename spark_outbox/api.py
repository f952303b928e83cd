"""The names that code written for django-spark imports, with what it expects of them.

    from spark import api   becomes   from spark_outbox import api

One thing differs, and is why one ports: an event is written in the caller's transaction and handled
after its commit, by a worker (or in the same process, with DISPATCH = "on_commit").
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from django.db.models import Model

from spark_outbox.emitting.emit import AnyEvent, emit, emit_many
from spark_outbox.errors import RegistrationError
from spark_outbox.events.event import Event
from spark_outbox.registry.callables import has_name_of_its_own, path_of
from spark_outbox.registry.handlers import HandlerFunction, SourceFunction, registry

__all__ = [
    "HANDLERS",
    "MODEL_SOURCES",
    "Event",
    "event",
    "only_new_events",
    "process_events",
    "register_group_handler",
    "register_model_event_source",
]


class _Handlers(Sequence[tuple[str, HandlerFunction]]):
    """A live view of the registered handlers, as django-spark's pairs of pattern and function."""

    @overload
    def __getitem__(self, index: int) -> tuple[str, HandlerFunction]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[str, HandlerFunction]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return [(handler.pattern.pattern, handler.function) for handler in registry.handlers][index]

    def __len__(self) -> int:
        return len(registry.handlers)


HANDLERS = _Handlers()
MODEL_SOURCES: Mapping[type[Model], list[SourceFunction]] = registry.sources


def event(group: str, instance_id: object, context: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return an event dict whose key is the group, an underscore, and `instance_id`."""
    return {"group": group, "key": f"{group}_{instance_id}", "context": dict(context or {})}


def process_events(iterable: Iterable[AnyEvent]) -> None:
    """Emit events; those whose key exists already are passed over."""
    emit_many(iterable)


def only_new_events(iterable: Iterable[AnyEvent]) -> Iterator[Event]:
    """Emit events one by one, and yield those whose key was new."""
    for item in iterable:
        stored = emit(item)
        if stored is not None:
            yield stored


def register_group_handler(*, group: str, handler: HandlerFunction, name: str | None = None) -> None:
    """Have `handler` called with each event whose group the regex `group` is found in.

    Retries are kept under its `name`. By default that is its dotted path. Others can have the same path
    if it is a partial, an object, an object's method, or made by a function. Its pattern follows then,
    and a number if it is not the first of that path and pattern: so register such in the same order.
    """
    registry.add_handler(handler, group=group, name=_name(group, handler) if name is None else name)


def _name(group: str, handler: HandlerFunction) -> str:
    """Return a name that a handler has in every process."""
    path = path_of(handler)
    alike = [each for each in registry.handlers if path_of(each.function) == path]
    of_group = [each for each in alike if each.pattern.pattern == group]
    if any(each.function == handler for each in of_group):
        raise RegistrationError(f"{path} is registered for {group!r} already.")
    if has_name_of_its_own(handler) and (of_group or all(each.name != path for each in alike)):
        return path
    return f"{path}:{group}" + (f"#{len(of_group) + 1}" if of_group else "")


def register_model_event_source(*, sender: type[Model], source: SourceFunction) -> None:
    """Emit what `source` yields for an instance of `sender` whenever one is saved."""
    registry.add_source(source, model=sender)
