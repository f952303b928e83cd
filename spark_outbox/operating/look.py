"""Look at the outbox: at the whole, and at one event. What commands and pages show comes from here."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db import ProgrammingError, transaction
from django.utils.module_loading import import_string
from psycopg.errors import InsufficientPrivilege

from spark_outbox import conf
from spark_outbox.events.encoding import TAG
from spark_outbox.events.event import Event, StoredRow
from spark_outbox.events.references import References
from spark_outbox.operating.patience import in_time
from spark_outbox.store import listing, pruning, repairing, viewing, waking
from spark_outbox.store.viewing import Filter, Row

REDACTED = "[redacted]"

BY_SEVERITY = ("ok", "warning", "critical")

MOST_GROUPS = 1000


def status(*, failures: bool = False, using: str) -> dict[str, list[Row]]:
    """Return the groups, the workers, what is paused, and the checks of health; and what fails, if
    asked."""
    found = {
        "groups": viewing.rows(viewing.STATUS, using=using),
        "workers": viewing.rows(viewing.WORKERS, using=using),
        "pauses": viewing.rows(viewing.PAUSES, using=using),
        "health": health(using=using),
    }
    if failures:
        found["failures"] = viewing.rows(viewing.FAILURES, using=using)
    return found


def health(*, max_lag: float | None = None, using: str) -> list[Row]:
    """Return the checks, as the settings see them; with `max_lag`, in seconds, that is where the lag
    becomes critical."""
    found = {check["name"]: check for check in viewing.rows(viewing.HEALTH, using=using)}
    if max_lag is not None:
        lag = viewing.rows(viewing.LAG, using=using)[0]["lag"] or 0.0
        found["lag"]["status"] = "critical" if lag > max_lag else "ok"
    settings = conf.current()
    mode = waking.wake_mode(using=using)
    if mode == settings.WAKE == "never":
        found["trigger"] |= {"status": "ok", "detail": "Workers poll, as the setting WAKE says."}
    elif mode != settings.WAKE:
        detail = f"The triggers are in mode {mode!r}, and the setting WAKE is {settings.WAKE!r}."
        found["trigger"] |= {"status": "warning", "detail": detail}
    if settings.DISPATCH == "on_commit" or settings.direct(using) is None:
        detail = "Workers without a session that lasts, and DISPATCH = 'on_commit', can't be seen."
        found["workers"] |= {"status": "ok", "detail": detail}
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Figures:
    """What machines watch."""

    groups: list[Row]
    workers: list[Row]
    pauses: list[Row]
    health: list[Row]
    open_circuits: list[str]
    """Handlers for which events wait, since they fail on everything."""
    overdue: float | None
    """By how many seconds the oldest event has outlived RETENTION; None if this role may not see it."""


def figures(*, using: str) -> Figures:
    """Read them. Raises TooSlow."""
    with in_time(using=using):
        found = status(using=using)
        circuits = [row["handler"] for row in viewing.rows(viewing.OPEN_CIRCUITS, using=using)]
        return Figures(**found, open_circuits=circuits, overdue=_overdue(using))


def _overdue(using: str) -> float | None:
    """Read by how much RETENTION is behind, in MOST_GROUPS groups of each state."""
    retention = conf.current().RETENTION
    try:
        with transaction.atomic(using=using):
            ended = pruning.oldest(retention.prunes, most=MOST_GROUPS, using=using)
    except ProgrammingError as error:
        if not isinstance(error.__cause__, InsufficientPrivilege):
            raise
        return None
    kept = [(each.age, retention.seconds(each.state, each.group)) for each in ended]
    # Those without a time are pruned as soon as a worker looks.
    behind = [age - seconds for age, seconds in kept if seconds and age < math.inf]
    return max([0.0, *behind])


def worst(checks: Sequence[Row]) -> int:
    """Return 0 if all is well, 1 after a warning, 2 if something is critical."""
    return max(BY_SEVERITY.index(check["status"]) for check in checks)


def events(wanted: Filter, *, limit: int, using: str) -> list[Row]:
    return viewing.events(wanted, limit=limit, using=using)


def event(key: str, *, using: str) -> Row | None:
    """Return one event whole: with its payload, if this role may see it, its deliveries and what
    spark_explain() says; None if there is none. A payload that SQL has nested deeper than Python reads
    is None."""
    shown = _event(key, using=using)
    if shown is not None:
        shown["deliveries"] = viewing.rows(viewing.DELIVERIES, {"key": key}, using=using)
        shown["explanation"] = explanation(key, using=using)
    return shown


def _event(key: str, *, using: str) -> Row | None:
    params = {"key": key}
    try:
        with transaction.atomic(using=using):
            found = viewing.rows(viewing.EVENT, params, using=using)
    except ProgrammingError as error:
        if not isinstance(error.__cause__, InsufficientPrivilege):
            raise
        found = viewing.rows(viewing.EVENT_WITHOUT_PAYLOAD, params, using=using)
    except RecursionError:
        found = viewing.rows(viewing.EVENT_WITHOUT_PAYLOAD, params, using=using)
    if not found:
        return None
    shown = found[0]
    for name in ("payload", "headers"):
        try:
            shown[name] = redacted(shown[name])
        except RecursionError:
            shown[name] = None
    return shown


def past_event(group: str, key: str, *, using: str) -> Event | None:
    """Return an event of a group as handlers get it, but without what REDACT hides: the one with this
    key, or the latest, if that is "". None if there is none whose payload can be shown.

    Raises TooSlow.
    """
    with in_time(using=using):
        if not key:
            ids = sorted(viewing.examples([group], each=1, using=using))
            key = next((row["key"] for row in listing.events_by_id(ids[-1:], using=using)), "")
        found = _event(key, using=using)
    if found is None or found["group"] != group or found["is_pruned"] or found["payload"] is None:
        return None
    row = StoredRow(found["id"], key, group, json.dumps(found["payload"]), "{}", None, 0, 0, None)
    return Event.from_row(row, References())


def explanation(key: str, *, using: str) -> list[str]:
    found = viewing.rows(viewing.EXPLANATION, {"key": key}, using=using)
    return [row["sentence"] for row in found]


def close_circuit(handler: str, *, using: str) -> int:
    """Have events handled now that wait since this handler has failed on everything; return how many."""
    return repairing.close_circuit(handler, using=using)


def redacted(document: Any) -> Any:
    """Return a payload or headers as SPARK_OUTBOX["REDACT"] lets them be shown."""
    redact = conf.current().REDACT
    if document is None:  # this role may not see it
        return None
    if isinstance(redact, str):
        return import_string(redact)(document)
    return _without(frozenset(redact), document) if redact else document


def _without(names: frozenset[str], document: Any) -> Any:
    if isinstance(document, Mapping):
        if (
            document.keys() == {TAG}
            and isinstance(found := document[TAG], list)
            and found[:1] == ["dict"]
        ):
            return {TAG: ["dict", *(_without_pairs(names, pairs) for pairs in found[1:])]}
        return {
            name: REDACTED if name in names else _without(names, value)
            for name, value in document.items()
        }
    if isinstance(document, list):
        return [_without(names, value) for value in document]
    return document


def _without_pairs(names: frozenset[str], pairs: Any) -> Any:
    """Redact a dict that is stored as pairs, since not all of its keys are text."""
    if not isinstance(pairs, list):
        return pairs
    return [
        [pair[0], REDACTED]
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and pair[0] in names
        else _without(names, pair)
        for pair in pairs
    ]
