"""Encodes Python values as the JSON text of the payload column. Runs no SQL.

A value that JSON lacks becomes an object with the one key "$":

    {"$": ["datetime", "2026-01-31T12:00:00+00:00"]}
    {"$": ["datetime", "2026-01-31T12:00:00+01:00", 0, "Europe/Zurich"]}     with its fold and its zone
    {"$": ["model", "shop.order", 5, "default"]}      a reference; see References

A user's dict that has a key "$", or a key that JSON would change (5 would come back as "5"), is written
as its pairs, {"$": ["dict", [[key, value], …]]}. So no stored value can be mistaken for one of our tags.
jsonb keeps numbers as decimals, so a float that would come back as an int is tagged, too, and so is a
negative zero. Text with a NUL or a lone surrogate is tagged, because jsonb refuses it.
"""

import base64
import datetime as dt
import decimal
import enum
import json
import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from zoneinfo import ZoneInfo

from django.db import models, router
from django.utils.functional import Promise

from spark_outbox.errors import UnstorableValue

TAG = "$"
MAX_DEPTH = 100
MAX_TEXT = 5 * 2**20
"""The most characters of JSON that emit() accepts for a payload, or for the headers."""

_quote = json.JSONEncoder().encode
"""Return text as JSON does, in ASCII. json.dumps would look at its options at each call."""

# The position of a value: its parent's place, its key or index in the parent, and its depth. It is
# formatted only for an error, so that the good case does not pay for it.
Place = tuple["Place | None", Any, int]
Encoder = Callable[[Any, Place], str]


def dump(values: Mapping[str, Any], *, root: str = "payload") -> str:
    """Return `values` as JSON text for a jsonb column.

    Raises UnstorableValue, which names the value's path, as in `payload["a"][3]`, and the cure.
    """
    place: Place = (None, root, 0)
    members = [f"{_name(name, root)}:{encode(values[name], (place, name, 1))}" for name in values]
    text = "{" + ",".join(members) + "}"
    if len(text) > MAX_TEXT:
        raise UnstorableValue(
            f"The {root} has {len(text):,} characters of JSON; the most is {MAX_TEXT:,}. "
            "Store large values in a table or file of their own, and emit a key."
        )
    return text


def encode(value: Any, place: Place) -> str:
    """Return `value` as JSON that jsonb returns unchanged. It is ASCII, in one line."""
    encoder = _ENCODERS.get(type(value)) or _find_encoder(value, place)
    return encoder(value, place)


def _name(name: str, root: str) -> str:
    if not isinstance(name, str) or name == TAG or not is_plain_text(name):
        raise UnstorableValue(f"{root} can't have a value named {name!r}. Choose another name.")
    return _quote(name)


def is_plain_text(value: str) -> bool:
    """Return whether PostgreSQL can store `value`: it has no NUL and no lone surrogate."""
    if value.isascii():
        return "\0" not in value
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _tag(tag: str, *content: str) -> str:
    """Return the object for a value that JSON lacks; `content` is JSON already."""
    return f'{{"{TAG}":["{tag}",{",".join(content)}]}}'


def _constant(value: bool | None, _: Place) -> str:
    return "null" if value is None else "true" if value else "false"


def _str(value: str, _: Place) -> str:
    if is_plain_text(value):
        return _quote(value)
    return _tag("text", _base64(value.encode("utf-8", "surrogatepass")))


def _int(value: int, place: Place) -> str:
    if value.bit_length() > 12_000:  # Python itself won't read more than 4,300 digits
        raise _refuse(place, "is too large an integer", "Store it as text or bytes")
    return repr(value)


def _float(value: float, place: Place) -> str:
    if not math.isfinite(value):
        raise _refuse(place, f"is {value}, which JSON can't store", "Store None or text instead")
    text = repr(value)
    return _tag("float", _quote(text)) if "e" in text or text == "-0.0" else text


def _list(value: Iterable[Any], place: Place) -> str:
    depth = _deeper(place)
    return _array([encode(item, (place, index, depth)) for index, item in enumerate(value)])


def _array(items: Iterable[str]) -> str:
    return "[" + ",".join(items) + "]"


def _dict(value: Mapping[Any, Any], place: Place) -> str:
    depth = _deeper(place)
    if all(type(key) is str and key != TAG and is_plain_text(key) for key in value):
        members = [f"{_quote(key)}:{encode(item, (place, key, depth))}" for key, item in value.items()]
        return "{" + ",".join(members) + "}"
    pairs = [
        f"[{encode(key, (place, key, depth))},{encode(item, (place, key, depth))}]"
        for key, item in value.items()
    ]
    return _tag("dict", _array(pairs))


def _deeper(place: Place) -> int:
    depth = place[2] + 1
    if depth > MAX_DEPTH:  # a payload that was written can be read, even deep in a stack
        raise UnstorableValue(
            f"The payload is nested more than {MAX_DEPTH} levels deep, or contains itself. "
            "Store an identifier instead."
        )
    return depth


def _tagged_text(tag: str, convert: Callable[[Any], str]) -> Encoder:
    return lambda value, place: _tag(tag, _quote(convert(value)))


def _set(tag: str) -> Encoder:
    def encode_set(value: Iterable[Any], place: Place) -> str:
        depth = _deeper(place)
        items = [encode(item, (place, item, depth)) for item in value]
        return _tag(tag, _array(sorted(items)))  # the same text for the same set

    return encode_set


def _tuple(value: tuple[Any, ...], place: Place) -> str:
    return _tag("tuple", _list(value, place))


def _time(value: dt.time, place: Place) -> str:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise _refuse(place, "is a time in a zone without a fixed offset", "Store a datetime")
    return _moment("time", value)


def _moment(tag: str, value: dt.datetime | dt.time) -> str:
    moment = _quote(value.isoformat())
    zone = getattr(value.tzinfo, "key", None) if isinstance(value.tzinfo, ZoneInfo) else None
    if isinstance(zone, str) and is_plain_text(zone):
        return _tag(tag, moment, str(value.fold), _quote(zone))
    return _tag(tag, moment, "1") if value.fold else _tag(tag, moment)


def _timedelta(value: dt.timedelta, _: Place) -> str:
    return _tag("timedelta", f"[{value.days},{value.seconds},{value.microseconds}]")


def _base64(value: bytes | bytearray | memoryview) -> str:
    return _quote(base64.b64encode(bytes(value)).decode("ascii"))


def _bytes(value: bytes | bytearray | memoryview, _: Place) -> str:
    return _tag("bytes", _base64(value))


def _instance(value: models.Model, place: Place) -> str:
    key = value.pk
    if key is None or (isinstance(key, tuple) and None in key) or value._state.adding:
        raise _refuse(place, f"is an unsaved {value._meta.label}", "Call its save() before emit()")
    # Its current row is in the database that it is written to: not in a read replica.
    alias = router.db_for_write(type(value), instance=value)
    return _tag("model", _quote(value._meta.label_lower), encode(key, place), _quote(alias))


def _refuse(place: Place, what: str, cure: str) -> UnstorableValue:
    return UnstorableValue(f"{_text(place)} {what}. {cure}.")


def _text(place: Place) -> str:
    parent, key, _ = place
    if parent is None:
        return str(key)
    return _text(parent) + (f'["{key}"]' if isinstance(key, str) else f"[{key!r}]")


_ENCODERS: dict[type, Encoder] = {
    str: _str,
    int: _int,
    float: _float,
    bool: _constant,
    type(None): _constant,
    list: _list,
    dict: _dict,
    tuple: _tuple,
    set: _set("set"),
    frozenset: _set("frozenset"),
    dt.datetime: lambda value, place: _moment("datetime", value),
    dt.date: _tagged_text("date", dt.date.isoformat),
    dt.time: _time,
    dt.timedelta: _timedelta,
    decimal.Decimal: _tagged_text("decimal", str),
    uuid.UUID: _tagged_text("uuid", str),
    bytes: _bytes,
    bytearray: _bytes,
    memoryview: _bytes,
}

# For subclasses; the order matters: an enum may be an int, a datetime is a date, a bool an int.
_FALLBACKS: tuple[tuple[Any, Encoder], ...] = (
    (models.Model, _instance),
    (enum.Enum, lambda value, place: encode(value.value, place)),
    ((Promise, str), lambda value, place: _str(str(value), place)),
    (int, lambda value, place: _int(int(value), place)),
    (float, lambda value, place: _float(float(value), place)),
    (dt.datetime, _ENCODERS[dt.datetime]),
    *((kind, _ENCODERS[kind]) for kind in (dt.date, dt.time, dt.timedelta, decimal.Decimal)),
    *((kind, _ENCODERS[kind]) for kind in (uuid.UUID, bytes, bytearray, list, tuple)),
    *((kind, _ENCODERS[kind]) for kind in (set, frozenset)),
    (Mapping, _dict),
)


def _find_encoder(value: Any, place: Place) -> Encoder:
    # isinstance() looks at __class__, so it sees through Django's lazy objects, such as request.user.
    for kind, encoder in _FALLBACKS:
        if isinstance(value, kind):
            return encoder
    if isinstance(value, models.QuerySet | models.Manager):
        raise _refuse(place, "is a queryset", "Store a list of instances, or of their keys")
    if isinstance(value, type) or callable(value):
        raise _refuse(place, f"is callable ({value!r})", "Call it and store what it returns")
    kind_name = f"{type(value).__module__}.{type(value).__qualname__}"
    raise _refuse(
        place,
        f"is a {kind_name}, which can't be stored",
        "Store plain values (text, numbers, dates, lists, dicts) or a saved model instance",
    )
