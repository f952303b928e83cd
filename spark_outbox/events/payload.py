"""Python values <-> the JSON text in the payload column. Runs no SQL: References fetch the instances.

What JSON can't say is an object with the one key "$":

    {"$": ["datetime", "2026-01-31T12:00:00+00:00"]}
    {"$": ["datetime", "2026-01-31T12:00:00+01:00", 0, "Europe/Zurich"]}     with its fold and its zone
    {"$": ["model", "shop.order", 5, "default"]}      a reference; see References

A dict of the user's that has a key "$", or a key that JSON would change (5 would come back as "5"),
is written as its pairs, {"$": ["dict", [[key, value], …]]}, so nothing a user stores can be taken
for one of our tags. jsonb keeps numbers as decimals: a float that would come back as an int, or a
negative zero, is tagged too, and so is text with a NUL or a lone surrogate, which jsonb refuses.
"""

import base64
import contextlib
import copy
import datetime as dt
import decimal
import enum
import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from django.db import models, router
from django.utils.functional import Promise

from spark_outbox.errors import InstanceGone, UnreadablePayload, UnstorableValue
from spark_outbox.events.references import Fetched, References, locate

TAG = "$"
MAX_DEPTH = 100
MAX_DIGITS = 4300
"""Of an integer: Python reads no more, see sys.set_int_max_str_digits()."""

MAX_TEXT = 5 * 2**20
"""Characters of JSON that a payload, or the headers, may have when they are emitted."""
MAX_STORED = 32 * 2**20
"""Bytes of jsonb that are read: it takes up to six times the room of its text."""

# Where a value stands: its parent's place, its key or index there, and its depth. Only an error
# turns it into text, so that the good case pays for no formatting.
Place = tuple["Place | None", Any, int]
Encoder = Callable[[Any, Place], Any]


# Encoding


def dump(values: Mapping[str, Any], *, root: str = "payload") -> str:
    """Return `values` as JSON text for a jsonb column.

    Raises UnstorableValue, which names the value's path, as in `payload["a"][3]`, and the cure.
    """
    place: Place = (None, root, 0)
    document = {_plain_name(name, root): encode(values[name], (place, name, 1)) for name in values}
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    if len(text) > MAX_TEXT:
        raise UnstorableValue(
            f"{len(text):,} characters of JSON are too many for the {root}: the most is {MAX_TEXT:,}. "
            "Store what is large in a table or file of its own, and emit its key."
        )
    return text


def encode(value: Any, place: Place) -> Any:
    """Return `value` in terms that json.dumps takes and jsonb returns unchanged."""
    encoder = _ENCODERS.get(type(value)) or _find_encoder(value, place)
    return encoder(value, place)


def _plain_name(name: str, root: str) -> str:
    if not isinstance(name, str) or name == TAG or not is_plain_text(name):
        raise UnstorableValue(f"{root} can't have a value named {name!r}. Choose another name.")
    return name


def is_plain_text(value: str) -> bool:
    """Return whether PostgreSQL can store `value`: it has no NUL and no lone surrogate."""
    if value.isascii():
        return "\0" not in value
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _str(value: str, _: Place) -> Any:
    if is_plain_text(value):
        return value
    return {TAG: ["text", _base64(value.encode("utf-8", "surrogatepass"))]}


def _int(value: int, place: Place) -> Any:
    if value.bit_length() > 12_000:  # Python itself won't read more than 4,300 digits
        raise _refuse(place, "is too large an integer", "Store it as text or bytes")
    return value


def _float(value: float, place: Place) -> Any:
    if not math.isfinite(value):
        raise _refuse(place, f"is {value}, which JSON can't store", "Store None or text instead")
    text = repr(value)
    if "e" in text or text == "-0.0":
        return {TAG: ["float", text]}
    return value


def _list(value: Iterable[Any], place: Place) -> Any:
    depth = _deeper(place)
    return [encode(item, (place, index, depth)) for index, item in enumerate(value)]


def _dict(value: Mapping[Any, Any], place: Place) -> Any:
    depth = _deeper(place)
    if all(type(key) is str and key != TAG and is_plain_text(key) for key in value):
        return {key: encode(item, (place, key, depth)) for key, item in value.items()}
    pairs = [
        [encode(key, (place, key, depth)), encode(item, (place, key, depth))]
        for key, item in value.items()
    ]
    return {TAG: ["dict", pairs]}


def _deeper(place: Place) -> int:
    depth = place[2] + 1
    if depth > MAX_DEPTH:  # what can be written can be read, whatever the stack looks like then
        raise UnstorableValue(
            f"The payload is nested more than {MAX_DEPTH} levels deep, or contains itself. "
            "Store an identifier instead."
        )
    return depth


def _tagged(tag: str, convert: Callable[[Any], Any]) -> Encoder:
    return lambda value, place: {TAG: [tag, convert(value)]}


def _set(tag: str) -> Encoder:
    def encode_set(value: Iterable[Any], place: Place) -> Any:
        depth = _deeper(place)
        items = [encode(item, (place, item, depth)) for item in value]
        return {TAG: [tag, sorted(items, key=json.dumps)]}  # the same text for the same set

    return encode_set


def _tuple(value: tuple[Any, ...], place: Place) -> Any:
    return {TAG: ["tuple", _list(value, place)]}


def _time(value: dt.time, place: Place) -> Any:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise _refuse(place, "is a time in a zone without a fixed offset", "Store a datetime")
    return _moment("time", value)


def _moment(tag: str, value: dt.datetime | dt.time) -> Any:
    zone = getattr(value.tzinfo, "key", None) if isinstance(value.tzinfo, ZoneInfo) else None
    if isinstance(zone, str) and is_plain_text(zone):
        return {TAG: [tag, value.isoformat(), value.fold, zone]}
    return {TAG: [tag, value.isoformat(), *([1] if value.fold else [])]}


def _base64(value: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(bytes(value)).decode("ascii")


def _instance(value: models.Model, place: Place) -> Any:
    key = value.pk
    if key is None or (isinstance(key, tuple) and None in key) or value._state.adding:
        raise _refuse(place, f"is an unsaved {value._meta.label}", "Call its save() before emit()")
    # Where it is written is where it is current: with a read replica, the primary.
    alias = router.db_for_write(type(value), instance=value)
    return {TAG: ["model", value._meta.label_lower, encode(key, place), alias]}


def _refuse(place: Place, what: str, cure: str) -> UnstorableValue:
    return UnstorableValue(f"{_text(place)} {what}. {cure}.")


def _text(place: Place) -> str:
    parent, key, _ = place
    if parent is None:
        return str(key)
    return _text(parent) + (f'["{key}"]' if isinstance(key, str) else f"[{key!r}]")


def _as_is(value: Any, _: Place) -> Any:
    return value


_ENCODERS: dict[type, Encoder] = {
    str: _str,
    int: _int,
    float: _float,
    bool: _as_is,
    type(None): _as_is,
    list: _list,
    dict: _dict,
    tuple: _tuple,
    set: _set("set"),
    frozenset: _set("frozenset"),
    dt.datetime: lambda value, place: _moment("datetime", value),
    dt.date: _tagged("date", dt.date.isoformat),
    dt.time: _time,
    dt.timedelta: _tagged("timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    decimal.Decimal: _tagged("decimal", str),
    uuid.UUID: _tagged("uuid", str),
    bytes: _tagged("bytes", _base64),
    bytearray: _tagged("bytes", _base64),
    memoryview: _tagged("bytes", _base64),
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
    # isinstance() sees through Django's lazy objects, such as request.user, by __class__.
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


# Decoding


Text = str | Callable[[], str]
"""JSON text as it was claimed; or what fetches it, if it is large."""

Resolve = Callable[[Any, Any, Any], Any]
"""Takes the label, the key and the alias of a model reference; returns what is to stand for it."""


class LazyPayload(Mapping[str, Any]):
    """A stored payload: parsed at first access, each top-level value decoded when it is asked for.

    Raises UnreadablePayload if the text is not an object that `dump` could have written. The headers
    are one, too; `root` says so.
    """

    __slots__ = ("_document", "_gone", "_references", "_root", "_text", "_values")

    def __init__(self, text: Text, references: References, root: str = "payload") -> None:
        self._text = text
        self._references = references
        self._root = root
        self._document: dict[str, Any] | None = None
        self._values: dict[str, Any] = {}
        self._gone: dict[str, InstanceGone] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            if name in self._gone:
                raise self._gone[name]
            self._values[name] = self._read(self._parsed()[name])
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parsed())

    def __len__(self) -> int:
        return len(self._parsed())

    def copy(self) -> "LazyPayload":
        """Return one from which others can read without noticing each other."""
        new = copy.copy(self)
        new._values = {}
        new._gone = {}
        return new

    def load(self) -> None:
        """Decode everything now. A value whose instance is gone still says so when it is asked for."""
        for name in self._parsed():
            try:
                self._values[name] = self._read(self._parsed()[name])
            except InstanceGone as error:
                self._gone[name] = error

    def check(self) -> None:
        """Raise UnreadablePayload if it can't be decoded; fetches none of the instances."""
        for value in self._parsed().values():
            self._decode(value, locate)

    def start_over(self) -> None:
        """Decode anew what is asked for from now on: no reader sees what another made of it."""
        if self._values:
            self._values = {}

    def keys_of(self, label: str, alias: str) -> Iterator[Any]:
        """Yield the primary keys of the model `label` that this payload refers to.

        What can't be read is passed over: its own event will say so. So is a large payload that has
        not been fetched yet.
        """
        if self._document is None and not isinstance(self._text, str):
            return
        with contextlib.suppress(UnreadablePayload):
            yield from _keys_in(self._parsed(), label, alias)

    def _parsed(self) -> dict[str, Any]:
        if self._document is None:
            text = self._text if isinstance(self._text, str) else self._text()
            try:
                document = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UnreadablePayload(f"The {self._root} can't be parsed: {error}") from error
            if not isinstance(document, dict):
                kind = _KINDS[type(document)]
                raise UnreadablePayload(f"The {self._root} must be an object in JSON, and not {kind}.")
            self._document = document
        return self._document

    def _read(self, value: Any) -> Any:
        if not isinstance(value, dict | list):
            return value
        beside = Fetched(partial(_keys_in, value))
        return self._decode(value, partial(self._references.get, beside=beside))

    def _decode(self, value: Any, resolve: Resolve) -> Any:
        try:
            return decode(value, resolve)
        except RecursionError as error:
            raise UnreadablePayload(f"The {self._root} is nested too deeply.") from error


def is_simple(text: Text) -> bool:
    """Return whether a stored payload is so simple that nothing in it can be wrong. Most are.

    It is an object, has no tag, no number that is too long for Python, and is not nested too deeply.
    """
    if not isinstance(text, str) or len(text) >= MAX_DIGITS or text[:1] != "{":
        return False
    if TAG in text and f'"{TAG}"' in text:  # first what takes less time
        return False
    return len(text) < 2 * MAX_DEPTH or text.count("{") + text.count("[") <= MAX_DEPTH


def decode(value: Any, resolve: Resolve) -> Any:
    """Return what `encode` has made `value` of. Raises UnreadablePayload, and what `resolve` does."""
    if isinstance(value, list):
        return [decode(item, resolve) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or TAG not in value:
        return {key: decode(item, resolve) for key, item in value.items()}
    try:
        tag, *content = value[TAG]
        return _decode_tag(tag, content, resolve)
    except (UnreadablePayload, InstanceGone):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnreadablePayload(f"A tag can't be read: {value!r:.200} ({error!s:.200})") from error


def _decode_tag(tag: Any, content: list[Any], resolve: Resolve) -> Any:
    if tag == "model":
        label, pk, alias = content
        return resolve(label, decode(pk, _refuse_reference), alias)
    inner, *of_a_moment = content
    if of_a_moment:
        fold, *zone = of_a_moment
        moment = _DECODERS[tag](inner).replace(fold=fold)
        return _in_zone(moment, zone[0]) if zone else moment
    match tag:
        case "dict":
            return {decode(key, resolve): decode(item, resolve) for key, item in inner}
        case "tuple" | "set" | "frozenset":
            return _COLLECTIONS[tag](decode(item, resolve) for item in inner)
    return _DECODERS[tag](inner)


@cache
def zones() -> frozenset[str]:
    """Return the names of the time zones that this machine knows: no other is looked for by its name."""
    return frozenset(available_timezones())


def _in_zone(moment: Any, zone: str) -> Any:
    """Return the moment by the clocks of `zone`; as it is, if this machine does not know the zone."""
    if zone not in zones():
        return moment
    local = moment.replace(tzinfo=ZoneInfo(zone))
    if local.utcoffset() == moment.utcoffset():
        return local
    # The zone's rules have changed since: what counts is the moment.
    is_aware = isinstance(moment, dt.datetime) and moment.tzinfo is not None
    return moment.astimezone(local.tzinfo) if is_aware else moment


def _refuse_reference(label: Any, _pk: Any, _alias: Any) -> Any:
    raise UnreadablePayload(f"The payload has a reference to {label!r:.100} as the key of another.")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("It is no finite number.")
    return value


_KINDS = {
    list: "an array",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


_COLLECTIONS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}

_DECODERS: dict[str, Callable[[Any], Any]] = {
    "text": lambda text: base64.b64decode(text, validate=True).decode("utf-8", "surrogatepass"),
    "float": _finite,
    "datetime": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "time": dt.time.fromisoformat,
    "timedelta": lambda parts: dt.timedelta(*parts),
    "decimal": decimal.Decimal,
    "uuid": uuid.UUID,
    "bytes": lambda text: base64.b64decode(text, validate=True),
}


def _keys_in(value: Any, label: str, alias: str) -> Iterator[Any]:
    """Yield the keys of the model `label` that `value` refers to, but for those that can't be read."""
    with contextlib.suppress(RecursionError):
        for name, pk, where in list(_references_in(value)):
            if (name, where) == (label, alias):
                with contextlib.suppress(UnreadablePayload):
                    yield decode(pk, _refuse_reference)


def _references_in(value: Any) -> Iterator[tuple[Any, Any, Any]]:
    if isinstance(value, list):
        for item in value:
            yield from _references_in(item)
    elif isinstance(value, dict):
        match value:
            case {"$": ["model", label, pk, alias]} if len(value) == 1:
                yield label, pk, alias
            case _:
                for item in value.values():
                    yield from _references_in(item)
