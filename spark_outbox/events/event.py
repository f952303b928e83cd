"""Event: sources yield it, emit() returns it, handlers get it."""

import copy
import datetime as dt
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from django.utils.timezone import make_naive

from spark_outbox import conf
from spark_outbox.errors import InvalidEvent
from spark_outbox.events.decoding import LazyPayload, Text, is_simple
from spark_outbox.events.encoding import dump, is_plain_text
from spark_outbox.events.references import References

MAX_LENGTH = 255
"""The most characters of a group, a key or an ordering key. The table checks it as well."""


NO_HEADERS: Mapping[str, Any] = MappingProxyType({})

EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class StoredRow(NamedTuple):
    """A claimed row of the outbox table, in the order in which the store selects it."""

    id: int
    key: str
    group: str
    payload: Text
    headers: Text
    ordering_key: str | None
    attempts: int
    created: int
    """Microseconds since 1970."""
    available_at: dt.datetime | None
    """Like `created`, moved into the years that Python supports."""


class Event(Mapping[str, Any]):
    """A group, a unique key, and a payload: all other values, by name.

    `event["name"]` and `event.get("name")` look at group, key and payload; `event.name` looks at the
    event's own attributes first. Without a key, it gets a time-ordered UUID. `id` (0 before) and
    `created_at` are set when it is stored. `attempt` counts from 1. Events compare by identity.

    Raises InvalidEvent for a group or key that the table would refuse.
    """

    __slots__ = (
        "_created_at",
        "_generated",
        "_payload",
        "_references",
        "_text",
        "attempt",
        "available_at",
        "delay",
        "group",
        "headers",
        "id",
        "is_simple",
        "key",
        "ordering_key",
    )

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        /,
        group: str,
        key: str | None = None,
        *,
        ordering_key: str | None = None,
        available_at: dt.datetime | None = None,
        delay: dt.timedelta | float | None = None,
        headers: Mapping[str, Any] | None = None,
        **payload: Any,
    ) -> None:
        self.group = check_text("group", group)
        self._generated = time_ordered_key() if key is None else ""
        self.key = self._generated or check_text("key", key)
        self.ordering_key = None if ordering_key is None else check_text("ordering_key", ordering_key)
        if available_at is not None and delay is not None:
            raise InvalidEvent("Give available_at or delay, not both.")
        self.available_at = available_at
        self.delay = delay
        if headers is not None and not isinstance(headers, Mapping):
            raise InvalidEvent(f"The headers are a mapping, not {type(headers).__name__}.")
        self.headers: Mapping[str, Any] = headers or {}
        self._payload: Mapping[str, Any] | None = payload
        self._text: Text = ""
        self._references: References | None = None
        self.id = 0
        self._created_at: dt.datetime | int | None = None
        self.attempt = 1
        self.is_simple = True
        """Whether payload and headers need no `check` before a handler is called."""

    @classmethod
    def from_row(cls, row: StoredRow, references: References) -> Self:
        """Return a stored event, whose payload is parsed at first access."""
        event = cls.__new__(cls)
        (
            event.id,
            event.key,
            event.group,
            event._text,
            headers,
            event.ordering_key,
            attempts,
            event._created_at,
            event.available_at,
        ) = row
        event._generated = ""
        event._payload = None
        event._references = references
        event.headers = NO_HEADERS if headers == "{}" else LazyPayload(headers, references, "headers")
        event.is_simple = is_simple(event._text) and (headers == "{}" or is_simple(headers))
        event.attempt = attempts + 1 if attempts > 0 else 1
        event.delay = None
        return event

    @classmethod
    def from_rows(cls, rows: Iterable[StoredRow], references: References) -> list[Self]:
        """Return stored events whose model instances are fetched together."""
        events = [cls.from_row(row, references) for row in rows]
        references.add(events)
        return events

    @property
    def key_is_generated(self) -> bool:
        """Nobody has chosen the key, so that it need not be kept; False for an event that was stored."""
        return self.key == self._generated

    @property
    def payload(self) -> Mapping[str, Any]:
        """The values that the event was given by name, without its options."""
        if self._payload is None:
            self._payload = LazyPayload(self._text, self._references or References())
        return self._payload

    @property
    def created_at(self) -> dt.datetime | None:
        """When the event was stored, by the database's clock; None before that."""
        if isinstance(self._created_at, int):
            moment = EPOCH + dt.timedelta(microseconds=self._created_at)
            self._created_at = moment if conf.use_tz() else make_naive(moment)
        return self._created_at

    def is_stored_as(self, event_id: int, created: int) -> None:
        """Set the id, and the time in microseconds since 1970, that the database has assigned."""
        self.id, self._created_at = event_id, created

    @classmethod
    def of(cls, value: "Event | Mapping[str, Any]") -> "Event":
        """Return `value` as an Event; a mapping has the names that the constructor takes."""
        if isinstance(value, Event):
            return value
        if not isinstance(value, Mapping):
            raise InvalidEvent(
                f"An event is an Event or a dict with a group and a key, not {type(value).__name__}."
            )
        try:
            return cls(**value)
        except TypeError as error:
            if "group" not in value:
                raise InvalidEvent(f"This event has no group; it has {list(value)}.") from None
            raise InvalidEvent(f"This is no event: {error}") from error

    @classmethod
    def plain(cls, value: "Event | Mapping[str, Any]") -> "Event":
        """Return a dict of django-spark's shape as an Event: all but its group and key is payload, also
        what has the name of an option. The two become text, as in a CharField."""
        if isinstance(value, Event) or not isinstance(value, Mapping) or "group" not in value:
            return cls.of(value)
        payload = dict(value)
        group, key = payload.pop("group"), payload.pop("key", None)
        if key is None:
            raise InvalidEvent(f"The event of the group {group!s:.100} has no key.")
        event = cls(str(group), str(key))
        event._payload = payload
        return event

    def copy(self) -> "Event":
        """Return a copy of the stored event, for another handler. It shares no decoded values."""
        event = copy.copy(self)
        if isinstance(self._payload, LazyPayload):
            event._payload = self._payload.copy()
        if isinstance(self.headers, LazyPayload):
            event.headers = self.headers.copy()
        return event

    def check(self) -> None:
        """Raise UnreadablePayload unless a stored event's payload and headers can be read; of an event
        that is not stored, UnstorableValue unless they can be stored.

        Runs no query, except to load a payload or headers over 8 KB.
        """
        for root, part in (("payload", self.payload), ("headers", self.headers)):
            if isinstance(part, LazyPayload):
                part.check()
            else:
                dump(part, root=root)

    def load(self) -> None:
        """Decode a stored event's payload and headers now, and fetch the instances in them."""
        for part in (self.payload, self.headers):
            if isinstance(part, LazyPayload):
                part.load()

    def start_over(self) -> None:
        """Drop the decoded values of a stored event: the next handler decodes them again."""
        if self._payload is None and self.headers is NO_HEADERS:
            return  # nothing was decoded; this runs before each call, and isinstance() is slow
        if isinstance(self._payload, LazyPayload):
            self._payload.start_over()
        if isinstance(self.headers, LazyPayload):
            self.headers.start_over()

    def __getitem__(self, name: str) -> Any:
        if name == "group":
            return self.group
        if name == "key":
            return self.key
        return self.payload[name]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            try:
                return self.payload[name]
            except KeyError:
                pass
        raise AttributeError(f"This event has no {name!r} in its payload.")

    def __iter__(self) -> Iterator[str]:
        yield "group"
        yield "key"
        yield from self.payload

    def __len__(self) -> int:
        return 2 + len(self.payload)

    def __repr__(self) -> str:  # never the payload: this ends up in logs
        return f"<Event {self.group} {self.key!r} id={self.id}>"


def size_of(event: Event) -> int | None:
    """Return the bytes of a stored event's payload, as JSON; None if it is large and was not fetched."""
    return len(event._text.encode()) if isinstance(event._text, str) else None


def check_text(name: str, value: object) -> str:
    """Return `value` if it can be a group, key or ordering key; else raise InvalidEvent."""
    if not isinstance(value, str):
        raise InvalidEvent(f"The {name} must be text, not {type(value).__name__}: {value!r:.100}.")
    if not 0 < len(value) <= MAX_LENGTH:
        raise InvalidEvent(
            f"The {name} must have 1 to {MAX_LENGTH} characters; {value[:40]!r} has {len(value)}."
        )
    if not is_plain_text(value):
        raise InvalidEvent(f"The {name} {value!r} has a character that PostgreSQL can't store.")
    return str(value)


def time_ordered_key() -> str:
    """Return a new UUID of version 7 (RFC 9562). Such keys sort by time, to the millisecond."""
    milliseconds = time.time_ns() // 1_000_000
    random_bits = int.from_bytes(os.urandom(10)) & ~(0xF << 76) & ~(0b11 << 62)
    digits = f"{milliseconds << 80 | 0x7 << 76 | 0b10 << 62 | random_bits:032x}"  # uuid.UUID is slow
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def available_from(event: Event) -> float:
    """Return the seconds since 1970 from which on a stored event could be handled. It is no attribute,
    which would hide a value of the payload."""
    created = event._created_at
    if event.available_at is None and created.__class__ is int:
        return created / 1e6  # nearly always
    stored, available = event.created_at, event.available_at
    if stored is None:
        return 0.0
    return (stored if available is None else max(stored, available)).timestamp()
