"""DISPATCH = "on_commit": handle events in the process that has emitted them, after its commit."""

import logging
import threading

from django.db import connections

from spark_outbox import conf
from spark_outbox.errors import NotMigrated, describe
from spark_outbox.worker import ported
from spark_outbox.worker.context import Experience
from spark_outbox.worker.loop import Worker

logger = logging.getLogger(__name__)

_draining = threading.local()
_experience: dict[str, Experience] = {}
_with_keys: set[str] = set()
"""The databases that lack no key of django-spark."""


def drain_after_commit(using: str, **_: object) -> None:
    """Handle what was just committed.

    Events that handlers emit are handled by the call that is running, not by one inside it. An error is
    no fault of the caller's, who has committed: it is logged, and the events are left to the next call.
    """
    aliases: set[str] = _draining.__dict__.setdefault("aliases", set())
    if using in aliases:
        return
    aliases.add(using)
    try:
        _check_keys(using)
        Worker(using=using, experience=_experience_of(using)).drain()
    except Exception as error:  # noqa: BLE001, logged
        what = str(error) if isinstance(error, NotMigrated) else describe(error)
        context = {"database": using, "error": what}
        logger.error(
            "Events of database %(database)s could not be handled after the commit (%(error)s).",
            context,
            extra=context,
        )
    finally:
        aliases.discard(using)


def _check_keys(using: str) -> None:
    """Do once in this process what a worker does when it starts."""
    if using not in _with_keys and not connections[using].in_atomic_block:
        ported.check_keys(using=using)
        _with_keys.add(using)


def _experience_of(using: str) -> Experience | None:
    """Return what this process has learned at earlier commits, in any thread.

    None within a TestCase, whose tests must not see each other's circuits; nothing else handles events
    inside of a transaction.
    """
    if connections[using].in_atomic_block:
        return None
    known = _experience.get(using)
    if known is None or known.settings is not conf.current():
        known = _experience[using] = Experience()
    return known
