"""Turns references in payloads into model instances, fetched for a whole batch at once."""

import contextlib
import copy
import datetime as dt
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from itertools import islice
from typing import Any, NamedTuple, Protocol

from django.apps import apps
from django.core.exceptions import ValidationError
from django.core.validators import DecimalValidator
from django.db import connection, connections, models

from spark_outbox.errors import InstanceGone, UnreadablePayload

MOST_KEYS = 10_000
"""The most rows of a model that one query fetches: PostgreSQL accepts 65,535 parameters."""

Source = tuple[type[models.Model], str]

KeysOf = Callable[[str, str], Iterator[Any]]
"""Takes a model's label and an alias; yields the primary keys that a payload refers to. Skips those that
can't be read."""

IMMUTABLE = frozenset(
    {type(None), bool, int, float, str, bytes, Decimal, uuid.UUID}
    | {dt.date, dt.datetime, dt.time, dt.timedelta}
)


class Carrier(Protocol):
    """The part of an event that this module uses."""

    @property
    def payload(self) -> Any:
        """It has a `keys_of`, see KeysOf."""


class References:
    """The model instances that a batch's payloads refer to: one query a model, at first access.

    Each access returns a copy of its own, so that one handler does not see another's changes to an
    instance. Instances in the database `using`, the worker's, are kept for the batch. After a statement
    that may have changed a model's table they are dropped (see `forget`), and fetched again one by one.
    Changes of other databases go unseen, so their instances are not kept.
    """

    def __init__(self, using: str | None = None) -> None:
        self._using = using
        self._events: list[Carrier] = []
        self._kept = Fetched(self._keys_of)

    def add(self, events: Iterable[Carrier]) -> None:
        self._events += events

    def close(self) -> None:
        """End the batch. An event that is still in use fetches its own instances from now on."""
        self._using = None
        self._events.clear()
        self._kept.forget()

    def get(self, label: str, pk: Any, alias: str, *, beside: "Fetched") -> models.Model:
        """Return the row as it is now. Raises InstanceGone, or UnreadablePayload for an unknown model.

        Instances that are not kept for the batch come from `beside`, which lasts while one value is
        decoded.
        """
        source, pk = locate(label, pk, alias)
        return (self._kept if source[1] == self._using else beside).get(source, pk)

    def forget(self, sql: str | None = None) -> None:
        """Drop the instances that a statement on the worker's connection may have changed.

        These are the instances of the tables that it names, unless it only reads; or all instances, if
        it calls a function that may write anything. Changes that triggers or cascades make in other
        tables go unnoticed.
        """
        self._kept.forget(sql)

    def _keys_of(self, label: str, alias: str) -> Iterator[Any]:
        for event in self._events:
            yield from event.payload.keys_of(label, alias)


class Fetched:
    """Fetched rows. The first row of a model is fetched together with all that `keys_of` yields."""

    def __init__(self, keys_of: KeysOf) -> None:
        self._keys_of = keys_of
        self._rows: dict[Source, dict[Any, Row]] = {}

    def get(self, source: Source, pk: Any) -> models.Model:
        """Return a copy of the row. Raises InstanceGone."""
        if source not in self._rows:
            others = islice(self._others(source), MOST_KEYS)
            self._rows[source] = _fetch(source, {pk, *others})
        rows = self._rows[source]
        if pk not in rows:
            rows |= _fetch(source, {pk})
        if pk not in rows:
            model, alias = source
            raise InstanceGone(
                f"{model._meta.label} {pk!r} in database {alias!r} is gone: "
                "it was deleted after the event was emitted."
            )
        instance, is_flat = rows[pk]
        if is_flat:
            return copy.copy(instance)
        try:
            return copy.deepcopy(instance)
        except Exception:  # noqa: BLE001, it can't be copied: return it once, and fetch it again
            return rows.pop(pk)[0]

    def forget(self, sql: str | None = None) -> None:
        """Drop the rows that `sql` may have changed; without it, all rows."""
        if not self._rows:
            return
        sql = "" if sql is None else sql.replace('"', "").lower()
        changes_anything = not sql or _changes_anything(sql)
        if not changes_anything and sql.lstrip().startswith("select"):
            return
        for (model, _), rows in self._rows.items():
            tables = (parent._meta.db_table for parent in (model, *model._meta.get_parent_list()))
            if changes_anything or any(_bare(table) in sql for table in tables):
                rows.clear()

    def _others(self, source: Source) -> Iterator[Any]:
        model, alias = source
        for pk in self._keys_of(model._meta.label_lower, alias):
            # Another event's bad key raises when that event is read.
            with contextlib.suppress(UnreadablePayload):
                yield _key(model, pk)


class Row(NamedTuple):
    """A fetched row. It is never changed; readers get copies."""

    instance: models.Model
    is_flat: bool
    """Whether a shallow copy shares no mutable value with it."""


def locate(label: Any, pk: Any, alias: Any) -> tuple[Source, Any]:
    """Return the model and alias of a reference, and its key in the model's own type. Runs no query.

    Raises UnreadablePayload if there can be no such row.
    """
    model = _model(label)
    return (model, _alias(alias)), _key(model, pk)


def _fetch(source: Source, keys: Iterable[Any]) -> dict[Any, Row]:
    model, alias = source
    rows = model._base_manager.using(alias).filter(pk__in=list(keys))
    return {row.pk: Row(row, _is_flat(row)) for row in rows}


def _is_flat(row: models.Model) -> bool:
    state: Any = row._state
    return not state.fields_cache and all(
        type(value) in IMMUTABLE for value in vars(row).values() if value is not state
    )


# A word before a parenthesis: the table of an INSERT, or a name, perhaps of a function.
_CALLED = re.compile(r"\binto\s+[\w.]+\s*\(|\b(\w+)\s*\(")
# Keywords, and functions that only compute.
_HARMLESS = frozenset(
    """
    all and any array as between by case cast conflict distinct else end except exists extract
    filter from group having in intersect is join lateral like ilike limit not offset on or over
    partition row select set similar some then union using values when where within bit char
    character decimal double interval numeric time timestamp timestamptz varchar abs array_agg avg
    bool_and bool_or ceil ceiling char_length clock_timestamp coalesce concat count date_part
    date_trunc dense_rank every first_value floor greatest json_agg json_build_object jsonb_agg
    jsonb_build_object jsonb_build_array lag last_value lead least left length lower ltrim max md5
    min mod now nullif position power random rank replace right round row_number rtrim
    spark_outbox_check_keys spark_outbox_emit_many spark_outbox_is_same
    statement_timestamp string_agg strpos substring sum to_char trim unnest upper
    """.split()  # noqa: SIM905
)
_ANYTHING = ("rollback", "do", "execute")
"""The first words of statements that may change tables that they do not name."""


def _changes_anything(sql: str) -> bool:
    """Return whether a statement may change tables that it does not name."""
    sql = sql.strip("; \n\t")
    if ";" in sql or sql.startswith(_ANYTHING):
        return True
    return any(match[1] and match[1] not in _HARMLESS for match in _CALLED.finditer(sql))


def _bare(table: str) -> str:
    """Return a table's name without its schema, in lower case."""
    return table.replace('"', "").rpartition(".")[2].lower()


def _model(label: Any) -> type[models.Model]:
    try:
        return apps.get_model(label)  # looks at installed models only, and imports nothing
    except (LookupError, ValueError, AttributeError):
        raise UnreadablePayload(
            f"The payload refers to the model {label!r:.100}, which is not installed here."
        ) from None


def _alias(alias: Any) -> str:
    if alias not in connections:
        raise UnreadablePayload(f"The payload refers to the database {alias!r:.100}: no such alias.")
    return str(alias)


def _key(model: type[models.Model], pk: Any) -> Any:
    """Return `pk` in the model's own type. Raises UnreadablePayload if no row can have it."""
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
    """Return `value` in the type of a column; raise if PostgreSQL could not compare it with that column.

    A project's own validators and choices are not applied: they are for forms; rows may violate them.
    """
    while field.remote_field:  # the key is a foreign key: take the field that it refers to
        field = field.target_field
    if isinstance(value, Decimal) and not isinstance(field, models.DecimalField):
        raise TypeError("It is a Decimal.")  # int(Decimal("1e999999999")) would not return
    cleaned = field.to_python(value)
    hash(cleaned)
    if cleaned is None or (isinstance(cleaned, str) and b"\0" in cleaned.encode()):
        raise ValueError("No row can have it.")
    if isinstance(field, models.IntegerField):
        least, most = connection.ops.integer_field_range(field.get_internal_type())
        if not least <= cleaned <= most:
            raise ValueError("It is out of range.")
    elif isinstance(field, models.DecimalField):
        DecimalValidator(field.max_digits, field.decimal_places)(cleaned)
    elif isinstance(field, models.CharField):
        if field.max_length is not None and len(cleaned) > field.max_length:
            raise ValueError("It is too long.")
    elif isinstance(field, models.GenericIPAddressField):
        for validate in field.default_validators:
            validate(cleaned)
    return cleaned
