"""References in payloads -> model instances, fetched for a whole batch at once."""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from decimal import Decimal
from itertools import islice
from typing import Any, Protocol

from django.apps import apps
from django.core.exceptions import ValidationError
from django.db import connections, models

from spark_outbox.errors import InstanceGone, UnreadablePayload

MOST_KEYS = 10_000
"""So many rows of a model are fetched for a batch in advance: PostgreSQL takes 65,535 parameters."""

Source = tuple[type[models.Model], str]


class Carrier(Protocol):
    """An event, as far as this module is concerned."""

    @property
    def payload(self) -> Any:
        """It can `keys_of(label, alias)`: yield the primary keys of a model that it refers to, but for
        those that can't be read."""


class References:
    """The model instances that a batch's payloads refer to: one query a model, at first access.

    Every access hands out a copy of its own, so that what one handler does to an instance stays
    with it. After a statement that may have changed a model's table its instances are fetched anew,
    each when it is asked for; see `forget`.
    """

    def __init__(self) -> None:
        self._events: list[Carrier] = []
        self._fetched: dict[Source, dict[Any, models.Model]] = {}

    def add(self, events: Iterable[Carrier]) -> None:
        self._events += events

    def close(self) -> None:
        """End the batch: whoever kept an event fetches for it alone from now on."""
        self._events.clear()
        self._fetched.clear()

    def get(self, label: str, pk: Any, alias: str) -> models.Model:
        """Return the row as it is now. Raises InstanceGone, or UnreadablePayload for no such model."""
        source, pk = locate(label, pk, alias)
        if source not in self._fetched:
            others = islice(self._keys_of(source), MOST_KEYS)
            self._fetched[source] = _fetch(source, {pk, *others})
        found = self._fetched[source]
        if pk not in found:
            found |= _fetch(source, {pk})
        if pk not in found:
            raise InstanceGone(
                f"{source[0]._meta.label} {pk!r} in database {alias!r} is gone: "
                "it was deleted after the event was emitted."
            )
        return copy.copy(found[pk])

    def forget(self, sql: str | None = None) -> None:
        """Drop the instances whose tables `sql` names; all of them without it."""
        for (model, _), found in self._fetched.items():
            tables = (parent._meta.db_table for parent in (model, *model._meta.get_parent_list()))
            if sql is None or any(table in sql for table in tables):
                found.clear()

    def _keys_of(self, source: Source) -> Iterator[Any]:
        model, alias = source
        for event in self._events:
            for pk in event.payload.keys_of(model._meta.label_lower, alias):
                # What is wrong with another event's key is for that event to say.
                with contextlib.suppress(UnreadablePayload):
                    yield _key(model, pk)


def locate(label: Any, pk: Any, alias: Any) -> tuple[Source, Any]:
    """Return where the instance is, and its key as the model's own rows have it; runs no query.

    Raises UnreadablePayload if no row can be meant.
    """
    model = _model(label)
    return (model, _alias(alias)), _key(model, pk)


def _fetch(source: Source, keys: Iterable[Any]) -> dict[Any, models.Model]:
    model, alias = source
    return {row.pk: row for row in model._base_manager.using(alias).filter(pk__in=keys)}


def _model(label: Any) -> type[models.Model]:
    try:
        return apps.get_model(label)  # looks among the installed ones, and imports nothing
    except (LookupError, ValueError, AttributeError):
        raise UnreadablePayload(
            f"The payload refers to the model {label!r:.100}, which is not installed here."
        ) from None


def _alias(alias: Any) -> str:
    if alias not in connections:
        raise UnreadablePayload(f"The payload refers to the database {alias!r:.100}: no such alias.")
    return str(alias)


def _key(model: type[models.Model], pk: Any) -> Any:
    """Return `pk` as the model's own rows have it. Raises UnreadablePayload if none can."""
    fields = model._meta.pk_fields
    try:
        parts = zip(fields, pk if len(fields) > 1 else (pk,), strict=True)
        cleaned = tuple(_clean(field, value) for field, value in parts)
    except (ArithmeticError, AttributeError, TypeError, ValueError, ValidationError) as error:
        raise UnreadablePayload(
            f"{pk!r:.100} is no key of {model._meta.label}: {error!s:.200}"
        ) from error
    return cleaned if len(fields) > 1 else cleaned[0]


def _clean(field: Any, value: Any) -> Any:
    while field.remote_field:  # a key that is a foreign key: the field that it holds the value of
        field = field.target_field
    if isinstance(value, Decimal) and not isinstance(field, models.DecimalField):
        raise TypeError("It is a Decimal.")  # int(Decimal("1e999999999")) would not return
    cleaned = field.clean(value, None)
    hash(cleaned)
    if cleaned is None or (isinstance(cleaned, str) and b"\0" in cleaned.encode()):
        raise ValueError("No row can have it.")
    return cleaned
