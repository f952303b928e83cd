"""The names of django-spark, for code that was written for it.

    from spark import api   becomes   from spark_outbox import api

One thing differs: an event is written in the caller's transaction, and handled after its commit by a
worker (or, with DISPATCH = "on_commit", in the same process).
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
    """Emit events; skip each whose key exists already."""
    emit_many(iterable)


def only_new_events(iterable: Iterable[AnyEvent]) -> Iterator[Event]:
    """Emit events one by one, and yield those whose key was new."""
    for item in iterable:
        stored = emit(item)
        if stored is not None:
            yield stored


def register_group_handler(*, group: str, handler: HandlerFunction, name: str | None = None) -> None:
    """Call `handler` with each event whose group matches the regex `group`.

    Its deliveries are stored under `name`, by default its dotted path. A partial, an object, a bound
    method or an inner function can share its path with others. Its name then has the pattern as well,
    and a number if another handler has both. Register such handlers in the same order in every process.
    Raises RegistrationError.
    """
    registry.add_handler(handler, group=group, name=_name(group, handler) if name is None else name)


def _name(group: str, handler: HandlerFunction) -> str:
    """Return a name for a handler that is the same in every process."""
    path = path_of(handler)
    alike = [each for each in registry.handlers if path_of(each.function) == path]
    of_group = [each for each in alike if each.pattern.pattern == group]
    if any(each.function == handler for each in of_group):
        raise RegistrationError(f"{path} is registered for {group!r} already.")
    if has_name_of_its_own(handler) and (of_group or all(each.name != path for each in alike)):
        return path
    return f"{path}:{group}" + (f"#{len(of_group) + 1}" if of_group else "")


def register_model_event_source(*, sender: type[Model], source: SourceFunction) -> None:
    """Emit the events that `source` yields, each time an instance of `sender` is saved."""
    registry.add_source(source, model=sender)
