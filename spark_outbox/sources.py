"""Let the registered sources speak: on every save, and in a sweep over all instances of a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.models import Model

from spark_outbox.emit import emit_many, prepare, write
from spark_outbox.events import Event
from spark_outbox.registry import SourceFunction, registry
from spark_outbox.store import NewRow


def emit_on_save(sender: type[Model], instance: Model, using: str, raw: bool = False, **_: Any) -> None:
    """Receive post_save: emit what the model's sources yield, in the saver's transaction.

    A fixture being loaded (`raw`) is left to the next sweep: what it refers to may be missing yet.
    """
    if raw:
        return
    for source in registry.sources.get(sender, ()):
        emit_many(source(instance) or (), using=using)


@dataclass(slots=True)
class Sweep:
    """What a sweep has done so far."""

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
    on_error: Callable[[Model, SourceFunction, Exception], None],
) -> Iterator[Sweep]:
    """Send every instance of `model` through `sources`; yield the count after each chunk.

    Holds one chunk in memory, and no transaction or cursor open between chunks. What one instance
    does wrong goes to `on_error` and costs only that instance's events of that source.
    """
    count = Sweep()
    for instances in _chunks(model, using, chunk_size):
        rows: list[NewRow] = []
        for instance in instances:
            for source in sources:
                try:
                    rows += [prepare(Event.of(event)) for event in source(instance) or ()]
                except Exception as error:  # noqa: BLE001, reported and counted
                    count.errors += 1
                    on_error(instance, source, error)
        count.instances += len(instances)
        count.events += len(rows)
        if rows:
            with transaction.atomic(using=using):
                count.new += write(rows, using=using)
                transaction.set_rollback(dry_run, using=using)
        yield count


def _chunks(model: type[Model], using: str, size: int) -> Iterator[list[Model]]:
    """Page through all instances by primary key: no cursor or snapshot that outlives a chunk."""
    queryset = model._default_manager.using(using).order_by("pk")
    chunk = list(queryset[:size])
    while chunk:
        yield chunk
        chunk = list(queryset.filter(pk__gt=chunk[-1].pk)[:size]) if len(chunk) == size else []
