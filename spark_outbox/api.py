"""The names of django-spark, for code that was written for it.

    from spark import api               becomes   from spark_outbox import api
    from spark.models import Event      becomes   from spark_outbox.models import Event

An event is written in the caller's transaction, and handled after its commit by a worker (or, with
DISPATCH = "on_commit", in the same process). Handlers that are registered here get a dict.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableSequence
from functools import partial
from typing import Any, Self, overload

from django.apps import apps
from django.db.models import Model
from django.db.models.utils import make_model_tuple

from spark_outbox.emitting.emit import AnyEvent, emit_many
from spark_outbox.emitting.remembering import hand_over, remember
from spark_outbox.errors import RegistrationError
from spark_outbox.events import event as events
from spark_outbox.registry.callables import has_name_of_its_own, path_of
from spark_outbox.registry.handlers import Handler, HandlerFunction, SourceFunction, registry
from spark_outbox.store.emitting import NewRow

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


class Event(dict[str, Any]):
    """A dict with a group, a key and any other values, which are its attributes as well.

    In a handler it also has the attributes of spark_outbox.Event: `id`, `attempt`, `created_at`. Each
    handler gets a dict of its own, and may change it. A copy has the values alone.
    """

    _stored: events.Event | None = None

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return self  # for vars(): it was a namespace once

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if self._stored is None or name.startswith("_"):
            raise AttributeError(f"This event has no {name!r}.")
        return getattr(self._stored, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(f"This event has no {name!r}.")
        del self[name]

    def __reduce__(self) -> Any:
        return type(self), (dict(self),)


# Not methods of it: their names may be those of values.


def _for_handler(stored: events.Event) -> Event:
    """Return what a handler gets. Fetches the instances; raises InstanceGone."""
    made = Event(stored)
    object.__setattr__(made, "_stored", stored)
    return made


class _NewKey(str):
    """The key of an event that `only_new_events` has let pass; copies of the event have it, too."""

    kept: NewRow
    """What is stored."""


def _let_pass(item: AnyEvent, kept: NewRow) -> Event:
    """Return an event that `only_new_events` lets pass."""
    key = _NewKey(kept.key)
    key.kept = kept
    return Event(item, key=key)


def _is_handed_over(item: AnyEvent) -> bool:
    """Have an event handled that `only_new_events` has let pass, and nobody has processed yet; return
    whether it is one."""
    key = item.get("key") if isinstance(item, Mapping) else None
    return isinstance(key, _NewKey) and hand_over(item, key.kept)


Pair = tuple[str, HandlerFunction]


class _Registered(Pair):
    """A pattern and a function: a handler that keeps its name and its options if it is put back."""

    handler: Handler

    @classmethod
    def of(cls, handler: Handler) -> Self:
        made = cls((handler.pattern.pattern, handler.function))
        made.handler = handler
        return made


class _Handlers(MutableSequence[Pair]):
    """The registered handlers, as django-spark's list of patterns and functions."""

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return [_Registered.of(handler) for handler in registry.handlers][index]

    def __len__(self) -> int:
        return len(registry.handlers)

    def __eq__(self, other: object) -> bool:
        return list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __setitem__(self, index: int | slice, value: Any) -> None:
        place = index.indices(len(self))[0] if isinstance(index, slice) else range(len(self))[index]
        before = list(registry.handlers)
        del self[index]
        try:
            for number, pair in enumerate(value if isinstance(index, slice) else [value]):
                self.insert(place + number, pair)
        except BaseException:
            registry.arrange(before)
            raise

    def __delitem__(self, index: int | slice) -> None:
        kept = list(registry.handlers)
        del kept[index]
        registry.arrange(kept)

    def insert(self, index: int, value: Pair) -> None:
        arranged = list(registry.handlers)
        handler = getattr(value, "handler", None)
        if handler is None or any(each.name == handler.name for each in arranged):
            register_group_handler(group=value[0], handler=value[1])
            handler = registry.handlers[-1]
        arranged.insert(index, handler)
        registry.arrange(arranged)

    def copy(self) -> list[Pair]:
        return list(self)

    __copy__ = copy


HANDLERS = _Handlers()
MODEL_SOURCES: Mapping[type[Model], list[SourceFunction]] = registry.sources


def event(group: str, instance_id: object, context: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return an event dict whose key is the group, an underscore, and `instance_id`."""
    return {"group": group, "key": f"{group}_{instance_id}", "context": dict(context or {})}


class _NewEvents(Iterator[Event]):
    def __init__(self, items: Iterable[AnyEvent]) -> None:
        self.items = iter(items)

    def __next__(self) -> Event:
        return next(_let_pass(item, kept) for item in self.items if (kept := remember(item)))


def only_new_events(iterable: Iterable[AnyEvent]) -> Iterator[Event]:
    """Yield the events whose key is new, and keep their keys. Whoever takes them handles them.

    No worker does, unless they are given to `process_events`.
    """
    return _NewEvents(iterable)


def process_events(iterable: Iterable[AnyEvent]) -> None:
    """Emit events; skip each whose key exists already, unless `only_new_events` has let it pass.

    All values but group and key are payload, also those that have the name of an option of `emit`.
    """
    items = iterable.items if isinstance(iterable, _NewEvents) else iterable  # one INSERT, not two steps
    emit_many(events.Event.plain(item) for item in items if not _is_handed_over(item))


def register_group_handler(*, group: str, handler: HandlerFunction, name: str | None = None) -> None:
    """Call `handler` with each event whose group matches the regex `group`.

    Its deliveries are stored under `name`, by default its dotted path. A partial, an object, a bound
    method or an inner function can share its path with others. Its name then has the pattern as well,
    and a number if another handler has both. Register such handlers in the same order in every process.
    Raises RegistrationError.
    """
    name = _name(group, handler) if name is None else name
    registry.add_handler(handler, group=group, name=name, adapt=_for_handler)


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


def register_model_event_source(*, sender: type[Model] | str, source: SourceFunction) -> None:
    """Emit the events that `source` yields, each time an instance of `sender` is saved.

    All values but group and key are payload. `sender` may be the name of a model, `"app.Model"`, also
    before that is loaded. To register the same source again does nothing. Raises RegistrationError.
    """
    if isinstance(sender, str):
        apps.lazy_model_operation(partial(_add_source, source=source), make_model_tuple(sender))
    else:
        _add_source(sender, source=source)


def _add_source(model: type[Model], *, source: SourceFunction) -> None:
    if source not in registry.sources.get(model, ()):
        registry.add_source(source, model=model, adapt=events.Event.plain)
