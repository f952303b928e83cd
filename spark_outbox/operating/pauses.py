"""Pause a handler or a group by hand, and resume it."""

from difflib import get_close_matches

from spark_outbox.registry.handlers import registry
from spark_outbox.store import pausing, viewing
from spark_outbox.store.pausing import Changed
from spark_outbox.store.viewing import Row


def pause(kind: str, name: str, why: str, *, using: str) -> Changed:
    """Have workers call this handler, or any of this group's, no more: at the latest from their first
    batch that begins 0.8 s later."""
    return pausing.pause(kind, name, why, using=using)


def resume(kind: str, name: str, *, using: str) -> Changed:
    """Have them called again, with what has waited."""
    return pausing.resume(kind, name, using=using)


def pauses(*, using: str) -> list[Row]:
    return viewing.rows(viewing.PAUSES, using=using)


def is_handler(name: str) -> bool:
    return any(handler.name == name for handler in registry.handlers)


def similar_handlers(name: str) -> list[str]:
    """Return the names that somebody may have meant: all, if none is similar."""
    names = [handler.name for handler in registry.handlers]
    return get_close_matches(name, names, n=5, cutoff=0.5) or names
