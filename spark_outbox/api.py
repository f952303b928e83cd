"""The names that code written for django-spark imports, with what it expects of them.

    from spark import api   becomes   from spark_outbox import api

One thing differs, and is why one ports: an event is written in the caller's transaction and handled
after its commit, by a worker (or in the same process, with DISPATCH = "on_commit").
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from django.db.models import Model

from spark_outbox.emit import AnyEvent, emit, emit_many
from spark_outbox.events import Event
from spark_outbox.registry import HandlerFunction, SourceFunction, registry

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


def register_group_handler(*, group: str, handler: HandlerFunction) -> None:
    """Have `handler` called with each event whose group the regex `group` is found in."""
    registry.add_handler(handler, group=group)


def register_model_event_source(*, sender: type[Model], source: SourceFunction) -> None:
    """Emit what `source` yields for an instance of `sender` whenever one is saved."""
    registry.add_source(source, model=sender)
