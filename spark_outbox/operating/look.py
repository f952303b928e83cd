"""Look at the outbox: at the whole, and at one event. What commands and pages show comes from here."""

from collections.abc import Mapping, Sequence
from typing import Any

from django.db import ProgrammingError
from django.utils.module_loading import import_string
from psycopg.errors import InsufficientPrivilege

from spark_outbox import conf
from spark_outbox.store import repairing, viewing
from spark_outbox.store.viewing import Filter, Row

REDACTED = "[redacted]"

BY_SEVERITY = ("ok", "warning", "critical")


def status(*, failures: bool = False, using: str) -> dict[str, list[Row]]:
    """Return the groups, the workers, and the checks of health; and what fails, if asked."""
    queries = {"groups": viewing.STATUS, "workers": viewing.WORKERS, "health": viewing.HEALTH}
    if failures:
        queries["failures"] = viewing.FAILURES
    return {name: viewing.rows(sql, using=using) for name, sql in queries.items()}


def health(*, max_lag: float | None = None, using: str) -> list[Row]:
    """Return the checks; with `max_lag`, in seconds, that is where the lag becomes critical."""
    found = viewing.rows(viewing.HEALTH, using=using)
    if max_lag is not None:
        lag = viewing.rows(viewing.LAG, using=using)[0]["lag"] or 0.0
        for check in found:
            if check["name"] == "lag":
                check["status"] = "critical" if lag > max_lag else "ok"
    return found


def worst(checks: Sequence[Row]) -> int:
    """Return 0 if all is well, 1 after a warning, 2 if something is critical."""
    return max(BY_SEVERITY.index(check["status"]) for check in checks)


def events(wanted: Filter, *, limit: int, using: str) -> list[Row]:
    return viewing.events(wanted, limit=limit, using=using)


def event(key: str, *, using: str) -> Row | None:
    """Return one event whole: with its payload, if this role may see it, its deliveries and what
    spark_explain() says; None if there is none."""
    params = {"key": key}
    try:
        found = viewing.rows(viewing.EVENT, params, using=using)
    except ProgrammingError as error:
        if not isinstance(error.__cause__, InsufficientPrivilege):
            raise
        found = viewing.rows(viewing.EVENT_WITHOUT_PAYLOAD, params, using=using)
    if not found:
        return None
    shown = found[0]
    for name in ("payload", "headers"):
        shown[name] = redacted(shown[name])
    shown["deliveries"] = viewing.rows(viewing.DELIVERIES, params, using=using)
    shown["explanation"] = explanation(key, using=using)
    return shown


def explanation(key: str, *, using: str) -> list[str]:
    found = viewing.rows(viewing.EXPLANATION, {"key": key}, using=using)
    return [row["sentence"] for row in found]


def close_circuit(handler: str, *, using: str) -> int:
    """Have events handled now that wait since this handler has failed on everything; return how many."""
    return repairing.close_circuit(handler, using=using)


def redacted(document: Any) -> Any:
    """Return a payload or headers as SPARK_OUTBOX["REDACT"] lets them be shown."""
    redact = conf.current().REDACT
    if isinstance(redact, str):
        return import_string(redact)(document)
    return _without(frozenset(redact), document) if redact else document


def _without(names: frozenset[str], document: Any) -> Any:
    if isinstance(document, Mapping):
        return {
            name: REDACTED if name in names else _without(names, value)
            for name, value in document.items()
        }
    if isinstance(document, list):
        return [_without(names, value) for value in document]
    return document
