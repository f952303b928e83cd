"""Retry and discard events by hand, one by one or many of a kind."""

from collections.abc import Callable, Iterator

from spark_outbox.store import repairing
from spark_outbox.store.repairing import Changed, Failed

CHUNK_SIZE = 500

COUNTED = 100_000
"""To count more events than this would take too long."""


def is_possible(*, using: str) -> bool:
    """Return whether this session may change events: so no replica, and no role that only looks."""
    return repairing.can_repair(using=using)


def retry(keys: list[str], *, using: str) -> Iterator[Changed]:
    """Have these events handled now; yield for each what came of it."""
    for key in keys:
        yield repairing.retry(key, using=using)


def discard(keys: list[str], why: str, *, using: str) -> Iterator[Changed]:
    """Give these events up; yield for each what came of it."""
    for key in keys:
        yield repairing.discard(key, why, using=using)


def count(failed: Failed, *, using: str) -> int:
    """Return how many events have failed so, COUNTED + 1 if there are more than COUNTED."""
    return repairing.count_failed(failed, most=COUNTED + 1, using=using)


def retry_failed(failed: Failed, *, most: int, using: str) -> Iterator[Changed]:
    """Have up to `most` events handled now that have failed so; yield what each chunk has changed."""
    return _in_chunks(lambda size: repairing.retry_failed(failed, most=size, using=using), most)


def discard_failed(failed: Failed, why: str, *, most: int, using: str) -> Iterator[Changed]:
    """Give up to `most` events up that have failed so; yield what each chunk has changed."""
    return _in_chunks(lambda size: repairing.discard_failed(failed, why, most=size, using=using), most)


def _in_chunks(change: Callable[[int], Changed], most: int) -> Iterator[Changed]:
    """Each chunk is a transaction. Ends as well if nothing is left but what others hold."""
    left = most
    while left > 0:
        changed = change(min(left, CHUNK_SIZE))
        yield changed
        if not changed[0]:
            return
        left -= len(changed[0])
