"""The event catalogue: which groups there are, who handles them, and what their payloads look like.

Of payloads it has types alone, of up to EACH of the latest events of a group in each state. It reads a
bounded number of rows.
"""

import datetime as dt
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from django.db.models import Model

from spark_outbox import conf
from spark_outbox.events.encoding import TAG
from spark_outbox.registry.callables import path_of
from spark_outbox.registry.handlers import Handler, Registry
from spark_outbox.store import checking, viewing

EACH = 2
MOST_GROUPS = 1000
CHUNK = 500
"""How many payloads are in memory at once."""

KINDS = {
    "text": "string",
    "float": "number",
    "dict": "object",
    "decimal": "decimal",
    "timedelta": "duration",
    **{name: name for name in ("datetime", "date", "time", "uuid", "bytes")},
}
"""What people call the tags of events/encoding.py that hold no other types."""

SIMPLE = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
}

COLLECTIONS = frozenset({"tuple", "set", "frozenset"})

_NAME = re.compile(r"[A-Za-z_]\w{0,62}", re.ASCII)


class Group(NamedTuple):
    name: str
    handlers: list[str]
    """Those that match it."""
    payload: dict[str, str] | None
    """The types of its values, with a `?` if not each example has one; None if this role may not see
    payloads, or there is no small one."""


class Described(NamedTuple):
    """A handler, as its decorator has it; what that leaves open is as in the settings."""

    name: str
    pattern: str
    kind: str
    groups: list[str]
    max_attempts: int
    backoff: str
    timeout: float | None
    retry_for: list[str]
    discard_for: list[str]
    batch: int | None


class Source(NamedTuple):
    model: str
    functions: list[str]


class Catalogue(NamedTuple):
    groups: list[Group]
    handlers: list[Described]
    sources: list[Source]


def catalogue(registry: Registry, *, using: str) -> Catalogue:
    """Return what this project and its outbox have."""
    seen = {row["group"] for row in viewing.rows(viewing.STATUS, using=using)}
    names = sorted(seen | checking.recent_groups(using=using).groups)[:MOST_GROUPS]
    payloads = _payloads(names, using=using) if checking.readable(using=using).payloads else {}
    return Catalogue(
        [Group(name, _matching(registry, name), payloads.get(name)) for name in names],
        [_described(handler, names) for handler in registry.handlers],
        [
            Source(_label(model), [path_of(function) for function in functions])
            for model, functions in registry.sources.items()
        ],
    )


def _matching(registry: Registry, group: str) -> list[str]:
    return [handler.name for handler in registry.handlers_for(group)]


def _described(handler: Handler, groups: Iterable[str]) -> Described:
    settings, policy = conf.current(), handler.policy
    backoff = settings.BACKOFF if policy.backoff is None else policy.backoff
    return Described(
        handler.name,
        handler.pattern.pattern,
        handler.kind.name.lower(),
        [group for group in groups if handler.pattern.search(group)],
        policy.max_attempts or settings.MAX_ATTEMPTS,
        path_of(backoff) if callable(backoff) else _delays(backoff),
        policy.limit(),
        [kind.__qualname__ for kind in policy.retry_for],
        [kind.__qualname__ for kind in policy.discard_for],
        handler.batch,
    )


def _delays(backoff: Any) -> str:
    each = backoff if isinstance(backoff, list | tuple) else [backoff]
    seconds = [item.total_seconds() if isinstance(item, dt.timedelta) else item for item in each]
    return ", ".join(f"{item:g}s" for item in seconds)


def _label(model: type[Model]) -> str:
    return model._meta.label


# Shapes


def _payloads(groups: list[str], *, using: str) -> dict[str, dict[str, str]]:
    """Return the types of the values of payloads, by group and name."""
    found: dict[str, list[dict[str, str]]] = {}
    ids = viewing.examples(groups, each=EACH, using=using)
    for start in range(0, len(ids), CHUNK):
        for row in checking.small_rows(ids[start : start + CHUNK], using=using):
            if isinstance(row.payload, str) and (shape := shape_of(row.payload)) is not None:
                found.setdefault(row.group, []).append(shape)
    return {group: _merged(shapes) for group, shapes in found.items()}


def _merged(shapes: list[dict[str, str]]) -> dict[str, str]:
    names = dict.fromkeys(name for shape in shapes for name in shape)
    merged = {}
    for name in names:
        kinds = _either(shape[name] for shape in shapes if name in shape)
        merged[name] = kinds if all(name in shape for shape in shapes) else f"{kinds}?"
    return merged


def shape_of(text: str) -> dict[str, str] | None:
    """Return the types of a stored payload's values, by name; None if it is none that emit() writes."""
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            return None
        if set(document) == {TAG}:
            return {}
        # A name that no Python code would have written is data.
        return {
            name if _NAME.fullmatch(name) else "(other)": _type(value)
            for name, value in document.items()
        }
    except (ValueError, RecursionError):
        return None


def _type(value: Any) -> str:
    match value:
        case dict():
            return _of_object(value)
        case list():
            return _of("list", value)
    return SIMPLE[type(value)]


def _of_object(value: dict[str, Any]) -> str:
    match value:
        case {"$": ["model", str() as label, *_]} if re.fullmatch(r"\w+\.\w+", label):
            return f"model {label}"
        case {"$": [str() as tag, list() as items, *_]} if tag in COLLECTIONS:
            return _of(tag, items)
        case {"$": [str() as tag, *_]}:
            return KINDS.get(tag, "unknown")
    return _of("object", value.values())  # its names may be data: they are left out


def _of(kind: str, items: Iterable[Any]) -> str:
    kinds = _either(map(_type, items))
    return f"{kind} of {kinds}" if kinds else kind


def _either(kinds: Iterable[str]) -> str:
    return " | ".join(sorted(set(kinds)))
