"""Triage: what fails, by kind; and retrying or discarding a kind, step by step."""

from typing import Any

from spark_outbox.operating import look
from spark_outbox.operating.patience import in_time
from spark_outbox.store import triaging, viewing
from spark_outbox.store.triaging import Kind, Place, Step
from spark_outbox.store.viewing import Row


def failures(*, using: str) -> list[Row]:
    """Return kinds of failures, the latest first: up to KINDS + 1. Raises TooSlow."""
    with in_time(using=using):
        return triaging.failures(using=using)


def kind(of: Kind, *, using: str) -> dict[str, Any]:
    """Return the latest events that failed so, how many failed for good, and the latest traceback."""
    with in_time(using=using):
        failed, is_bounded = triaging.count(of, using=using)
        return {
            "examples": triaging.examples(of, using=using),
            "failed": failed,
            "is_bounded": is_bounded,
            "latest": triaging.traceback(of, using=using),
        }


def count(of: Kind, *, using: str) -> tuple[int, bool]:
    """Return how many have failed for good among the first 10,000, and whether there are more."""
    with in_time(using=using):
        return triaging.count(of, using=using)


def step(of: Kind, place: Place, why: str | None, *, using: str) -> Step:
    """Retry the next of this kind that have failed for good; or discard them, if `why` is given. Raises
    TooSlow."""
    with in_time(using=using):
        return triaging.step(of, place, why, using=using)


def explain(key: str, *, using: str) -> tuple[Row | None, list[str]]:
    """Return an event without its payload, and the sentences that say where it is."""
    with in_time(using=using):
        found = viewing.rows(viewing.EVENT_WITHOUT_PAYLOAD, {"key": key}, using=using)
        return (found[0] if found else None), look.explanation(key, using=using)
