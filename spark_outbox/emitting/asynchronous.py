"""aemit(): emit from async code, in a thread."""

import datetime as dt
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from asgiref.sync import sync_to_async

from spark_outbox.emitting.emit import CHUNK_SIZE, AnyEvent, OnDuplicate, emit, emit_many
from spark_outbox.errors import NotInTransaction
from spark_outbox.events.event import Event


async def aemit(
    group: str | AnyEvent,
    key: str | None = None,
    *,
    ordering_key: str | None = None,
    available_at: dt.datetime | None = None,
    delay: dt.timedelta | float | None = None,
    headers: Mapping[str, Any] | None = None,
    using: str | None = None,
    on_duplicate: OnDuplicate = "ignore",
    **payload: Any,
) -> Event | None:
    """Emit from async code: run `emit` in a thread, as Django's async ORM methods do.

    Each await is a transaction of its own. If the task is cancelled between two of them, a row can be
    saved without its event. To write both in one transaction, run a function that does so under
    `transaction.atomic()` in `sync_to_async`.
    """
    with _cure_for_async_code():
        return await sync_to_async(emit)(
            group,
            key,
            ordering_key=ordering_key,
            available_at=available_at,
            delay=delay,
            headers=headers,
            using=using,
            on_duplicate=on_duplicate,
            **payload,
        )


async def aemit_many(
    events: Iterable[AnyEvent] | AsyncIterable[AnyEvent],
    using: str | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> int:
    """Emit from async code, as `emit_many` does; `events` may be an async iterable, too."""
    emit_chunk = sync_to_async(partial(emit_many, using=using, chunk_size=chunk_size))
    with _cure_for_async_code():
        if not isinstance(events, AsyncIterable):
            return await emit_chunk(events)
        new = 0
        chunk: list[AnyEvent] = []
        async for event in events:
            chunk.append(event)
            if len(chunk) >= chunk_size:
                new += await emit_chunk(chunk)
                chunk = []
        return new + await emit_chunk(chunk)


@contextmanager
def _cure_for_async_code() -> Iterator[None]:
    """Add to NotInTransaction how to open a transaction in async code."""
    try:
        yield
    except NotInTransaction as error:
        raise NotInTransaction(
            f"{error} Django has no async atomic(): move that block into a plain function, and call "
            "it with await sync_to_async(function)(…)."
        ) from None
