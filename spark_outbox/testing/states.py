"""What a run of a handler has changed in the database, in a form in which two runs can be compared.

Left out is what differs between any two runs: times, UUIDs, and keys that the database gives to rows.
"""

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Collection
from typing import Any

from django.apps import apps
from django.db import connections, models

from spark_outbox.models import OutboxEvent
from spark_outbox.store import testing

Rows = dict[tuple[Any, ...], dict[str, Any]]
"""A table's rows, by primary key."""


class States:
    """The tables that a handler writes, before it and after its runs. All runs begin in one state.

    `ignored` has names of fields, such as `orders.Order.token`.
    """

    def __init__(self, ignored: Collection[str], *, using: str) -> None:
        self._using = using
        self._ignored = ignored
        self._models = {
            self._table(model): model
            for model in apps.get_models(include_auto_created=True)
            if not model._meta.proxy
        }
        self._written: set[str] = set()
        self._before: dict[str, Rows] = {}

    def _table(self, model: type[models.Model]) -> str:
        return connections[self._using].ops.quote_name(model._meta.db_table)

    def read(self) -> dict[str, Rows]:
        """Return the tables that this transaction has written, also if that was rolled back."""
        self._written |= testing.tables_written(list(self._models), using=self._using)
        return {table: self._rows(table) for table in sorted(self._written)}

    def changes(self, after: dict[str, Rows]) -> "Counter[str]":
        """Return what is different in them; when they are again as they were before."""
        for table in self._written - self._before.keys():
            self._before[table] = self._rows(table)
        changes: Counter[str] = Counter()
        for table, rows in after.items():
            changes.update(self._changed(self._models[table], self._before[table], rows))
        return changes

    def _rows(self, table: str) -> Rows:
        model = self._models[table]
        names = [field.attname for field in model._meta.local_concrete_fields]
        keys = [field.attname for field in model._meta.pk_fields]
        every: models.QuerySet[Any] = models.QuerySet(
            model, using=self._using
        )  # a manager may hide some
        rows = every.values_list(*names)
        found = (dict(zip(names, row, strict=True)) for row in rows)
        return {tuple(row[name] for name in keys): row for row in found}

    def _changed(self, model: type[models.Model], before: Rows, after: Rows) -> list[str]:
        label = model._meta.label
        lines = [f"{label} {key}: deleted" for key in before.keys() - after.keys()]
        for key, row in after.items():
            old = before.get(key)
            shown = self._shown(model, row, old or {})
            if old is None:
                lines.append(f"{label}: a new row, {shown}")
            elif shown:
                lines.append(f"{label} {key}: changed, {shown}")
        return lines

    def _shown(self, model: type[models.Model], row: dict[str, Any], old: dict[str, Any]) -> str:
        """Return the values that are not the old ones."""
        parts = []
        for field in model._meta.local_concrete_fields:
            name, value = field.attname, row[field.attname]
            is_ignored = f"{model._meta.label}.{field.name}" in self._ignored
            if is_ignored or isinstance(field, models.AutoField) or old.get(name) == value:
                continue
            if model is OutboxEvent and name == "key" and row["key_is_generated"]:
                value = uuid.UUID(int=0)
            parts.append(f"{name}={self._plain(field, value)}")
        return ", ".join(parts)

    def _plain(self, field: "models.Field[Any, Any]", value: Any) -> str:
        if isinstance(value, dt.datetime | dt.time):
            return "(a time)"
        if isinstance(value, uuid.UUID):
            return "(a UUID)"
        if value is not None and isinstance(field, models.ForeignKey) and self._is_new(field, value):
            return f"(a new {field.related_model._meta.label})"
        return repr(value)

    def _is_new(self, field: "models.ForeignKey[Any, Any]", value: Any) -> bool:
        """Return whether it refers to a new row, by a key that the database has given to it."""
        target = field.target_field
        while isinstance(target, models.ForeignKey):
            target = target.target_field
        before = self._before.get(self._table(target.model))
        return isinstance(target, models.AutoField) and before is not None and (value,) not in before
