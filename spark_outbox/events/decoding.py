"""Decodes the JSON text of the payload column, as written by encoding.py.

Runs no SQL: References fetch the model instances. Other programs may write the column, too, so no text
is trusted: if `dump` could not have written it, it raises UnreadablePayload.
"""

import base64
import contextlib
import copy
import datetime as dt
import decimal
import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from spark_outbox.errors import InstanceGone, UnreadablePayload
from spark_outbox.events.encoding import MAX_DEPTH, TAG
from spark_outbox.events.references import Fetched, References, locate

MAX_DIGITS = 4300
"""The most digits of an integer that Python reads; see sys.set_int_max_str_digits()."""

MAX_STORED = 32 * 2**20
"""The most bytes of a jsonb value that are read. It takes up to six times the bytes of its text."""

Text = str | Callable[[], str]
"""JSON text; or, if it is large, a function that fetches it."""

Resolve = Callable[[Any, Any, Any], Any]
"""Takes the label, the key and the alias of a model reference; returns the value that replaces it."""


class LazyPayload(Mapping[str, Any]):
    """A stored payload, parsed at first access. Each top-level value is decoded when it is read.

    Raises UnreadablePayload if the text is not an object that `dump` could have written. `root` is
    "payload" or "headers", for the error.
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
        """Return a copy that shares no decoded values with this one."""
        new = copy.copy(self)
        new._values = {}
        new._gone = {}
        return new

    def load(self) -> None:
        """Decode everything now. An instance that is gone raises InstanceGone only when it is read."""
        for name in self._parsed():
            try:
                self._values[name] = self._read(self._parsed()[name])
            except InstanceGone as error:
                self._gone[name] = error

    def check(self) -> None:
        """Raise UnreadablePayload if it can't be decoded. Fetches no instances."""
        for value in self._parsed().values():
            self._decode(value, locate)

    def start_over(self) -> None:
        """Drop the decoded values, so that the next reader does not see another's changes to them."""
        if self._values:
            self._values = {}

    def keys_of(self, label: str, alias: str) -> Iterator[Any]:
        """Yield the primary keys of the model `label` that this payload refers to.

        Skips keys that can't be read: their own event will raise the error. Yields none if the payload
        is large and has not been fetched yet.
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
                raise UnreadablePayload(f"The {self._root} must be an object in JSON, not {kind}.")
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
    """Return whether a stored payload needs no check before its handler is called, as most do.

    Such a payload is an object that has no tags, no numbers too long for Python, and is not too deep.
    """
    if not isinstance(text, str) or len(text) >= MAX_DIGITS or text[:1] != "{":
        return False
    if TAG in text and f'"{TAG}"' in text:  # the cheap test first
        return False
    return len(text) < 2 * MAX_DEPTH or text.count("{") + text.count("[") <= MAX_DEPTH


def decode(value: Any, resolve: Resolve) -> Any:
    """Reverse `encode`. Raises UnreadablePayload, and the errors of `resolve`."""
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
    """Return the names of this machine's time zones. ZoneInfo opens files: give it no other name."""
    return frozenset(available_timezones())


def _in_zone(moment: Any, zone: str) -> Any:
    """Return the moment in the time zone `zone`; unchanged, if this machine does not know the zone."""
    if zone not in zones():
        return moment
    local = moment.replace(tzinfo=ZoneInfo(zone))
    if local.utcoffset() == moment.utcoffset():
        return local
    # The zone's rules have changed since then: keep the moment.
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
    """Yield the keys of the model `label` that `value` refers to. Skips those that can't be read."""
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
