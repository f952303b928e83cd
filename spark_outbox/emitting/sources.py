"""Emits the events of registered sources: on every save, and in sweeps over a model's instances."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from django.apps import apps
from django.db import transaction
from django.db.models import Model

from spark_outbox.emitting.emit import chunks, emit_many, prepare, write
from spark_outbox.events.event import Event
from spark_outbox.registry.callables import Swept
from spark_outbox.registry.handlers import SourceFunction, registry
from spark_outbox.store.emitting import NewRow


def emit_on_save(sender: type[Model], instance: Model, using: str, raw: bool = False, **_: Any) -> None:
    """Receive post_save: emit what the model's sources yield, in the saver's transaction.

    Fixtures (`raw`) are left to the next sweep: rows that they refer to may not be loaded yet.
    """
    if raw:
        return
    for source, model in sources_of(sender, saved=True):
        emit_many(source(_as(model, instance, using)) or (), using=using)


def sources_of(model: type[Model], *, saved: bool = False) -> list[tuple[SourceFunction, type[Model]]]:
    """Return the sources of `model`, each once, with the model as whose instance it gets a row. With
    `saved` leave out those that only sweeps call.

    Sources of base classes are included, and come first. A source gets a row as an instance of the model
    that is swept for it: the one that it is registered for or, if that is abstract, the first concrete
    one below it.
    """
    found: list[tuple[SourceFunction, type[Model]]] = []
    for base in reversed(model.__mro__):
        for source in registry.sources.get(base, ()):
            if saved and isinstance(source, Swept):
                continue  # here and not later: a subclass may have it called by save()
            if all(source != other for other, _ in found):
                found.append((source, _first_concrete(model, base)))
    return found


def swept_models() -> dict[type[Model], list[SourceFunction]]:
    """Return the models to sweep and the sources of each, so that each source gets each row once. Rows
    of a child's table are swept with their parent's."""
    models: dict[type[Model], list[SourceFunction]] = {}
    for base in registry.sources:
        concrete = apps.get_models() if base._meta.abstract else [base]
        for model in concrete:
            if issubclass(model, base) and _first_concrete(model, base) is model:
                models[model] = [source for source, first in sources_of(model) if first is model]
    return models


def _first_concrete(model: type[Model], base: type[Model]) -> type[Model]:
    """Return the concrete class that is nearest to `base`, among `model` and its bases."""
    below: list[type[Model]] = [each for each in model.__mro__ if issubclass(each, base)]
    return [each for each in below if not each._meta.abstract][-1]


def _as(model: type[Model], instance: Model, using: str) -> Model:
    """Return the instance; or its parent of class `model`, if that has another primary key.

    Sources build event keys from the primary key, so it must be the same as in a sweep of `model`.
    """
    pk = getattr(instance, model._meta.pk.attname)
    if pk == instance.pk:
        return instance
    return model._base_manager.using(using).get(pk=pk)


@dataclass(slots=True)
class Sweep:
    """The counts of a sweep so far."""

    instances: int = 0
    events: int = 0
    new: int = 0
    errors: int = 0


def sweep(
    model: type[Model],
    sources: Sequence[SourceFunction],
    *,
    using: str,
    chunk_size: int,
    dry_run: bool,
    as_done: bool = False,
    on_error: Callable[[Model, SourceFunction, Exception], None],
) -> Iterator[Sweep]:
    """Pass every instance of `model` to `sources`; yield the counts after each chunk.

    A chunk has `chunk_size` instances; if they have more events than that, it is split. Keeps one chunk
    of instances and one of events in memory, and no transaction or cursor open between chunks. With
    `as_done` the events are not handled, but their keys are known from then on. The exception of one
    call goes to `on_error`, and ends that call: what it has yielded before is emitted. So does that of
    an event which can't be stored; it costs this event alone.
    """
    count = Sweep()
    known = sources_of(model)
    seen_as = [next((first for other, first in known if other == each), model) for each in sources]

    def report(instance: Model, source: SourceFunction, error: Exception) -> None:
        count.errors += 1
        on_error(instance, source, error)

    def rows_of(instance: Model) -> Iterator[NewRow]:
        for source, first in zip(sources, seen_as, strict=True):
            try:
                for event in source(_as(first, instance, using)) or ():
                    try:
                        row = prepare(Event.of(event))
                    except Exception as error:  # noqa: BLE001, reported and counted
                        report(instance, source, error)
                    else:
                        yield row
            except Exception as error:  # noqa: BLE001, reported and counted
                report(instance, source, error)

    for instances in _chunks(model, using, chunk_size):
        rows_of_all = (row for each in instances for row in rows_of(each))
        for number, rows in enumerate(chunks(rows_of_all, chunk_size)):
            if number:
                yield count
            count.events += len(rows)
            with transaction.atomic(using=using):
                # Nobody is told of what is rolled back.
                count.new += write(rows, as_done=as_done or dry_run, using=using)
                transaction.set_rollback(dry_run, using=using)
        count.instances += len(instances)
        yield count


def _chunks(model: type[Model], using: str, size: int) -> Iterator[list[Model]]:
    """Page through all instances by primary key, so that no cursor or snapshot outlives a chunk."""
    queryset = model._default_manager.using(using).order_by("pk")
    chunk = list(queryset[:size])
    while chunk:
        yield chunk
        chunk = list(queryset.filter(pk__gt=chunk[-1].pk)[:size]) if len(chunk) == size else []
