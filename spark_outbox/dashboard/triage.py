"""The pages of triage: what fails, and retrying or discarding it step by step.

Each POST does a step and says where the next begins. So a repair goes on only as long as somebody's
browser asks for it.
"""

import re
from typing import Any

from django.core.exceptions import BadRequest
from django.db import transaction
from django.http import HttpRequest
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from spark_outbox.dashboard import wording
from spark_outbox.dashboard.access import entry, may
from spark_outbox.dashboard.links import Links
from spark_outbox.operating import triage
from spark_outbox.store.triaging import COUNTED, KINDS, Kind, Place
from spark_outbox.store.viewing import Row

WINDOWS = {
    "hour": gettext_lazy("1 h"),
    "three_hours": gettext_lazy("3 h"),
    "day": gettext_lazy("24 h"),
    "three_days": gettext_lazy("3 d"),
    "week": gettext_lazy("7 d"),
}

ACTIONS = ("retry", "discard")

_TIME = re.compile(r"(now|-infinity|[-\d]+ [\d:.]+[-+:\d]+( BC)?)", re.ASCII)


def asked_kind(request: HttpRequest) -> Kind:
    """Return the kind of failure that a request is about."""
    asked = request.POST if request.method == "POST" else request.GET
    return Kind(*(asked.get(name, "").replace("\x00", "") for name in Kind._fields))


def actions(request: HttpRequest, *, is_possible: bool) -> list[str]:
    """Return what this user may do to events."""
    return [name for name in ACTIONS if is_possible and may(request, name)]


def failures(allowed: list[str], links: Links, *, using: str) -> dict[str, Any]:
    found = triage.failures(using=using)
    kinds = [_kind(row, allowed, links) for row in found[:KINDS] if not row["is_circuit"]]
    new = sum(kind["is_new"] for kind in kinds)
    text = ngettext("%(number)d kind of failure", "%(number)d kinds of failures", len(kinds))
    summary = text % {"number": len(kinds)}
    if new:
        summary += ", " + ngettext("%(number)d new", "%(number)d new", new) % {"number": new}
    return {
        "summary": f"{summary}.",
        "kinds": kinds,
        "allowed": allowed,
        "windows": list(WINDOWS.values()),
        "circuits": [
            {**row, "waiting": wording.number(row["retrying"], is_bounded=row["looked_at"] >= COUNTED)}
            for row in found[:KINDS]
            if row["is_circuit"]
        ],
        "shown": KINDS if len(found) > KINDS else 0,
        "counted": wording.number(COUNTED),
    }


def _kind(row: Row, allowed: list[str], links: Links) -> dict[str, Any]:
    of = Kind(row["handler"], row["fingerprint"])
    is_cut = row["looked_at"] >= COUNTED
    return {
        **row,
        "failed": wording.number(row["failed"], is_bounded=is_cut),
        "retrying": wording.number(row["retrying"], is_bounded=is_cut),
        "has_failed": row["failed"] > 0 or is_cut,
        "is_retrying": row["retrying"] > 0,
        "counts": [
            {
                "label": label,
                "value": wording.number(row[name], is_bounded=row[name] >= COUNTED),
                "heat": _heat(row[name]),
            }
            for name, label in WINDOWS.items()
        ],
        "first": wording.ago(row["first_at"]),
        "last": wording.ago(row["last_at"]),
        "url": links.of_kind("kind", of),
        **{name: links.of_kind(name, of) for name in allowed},
    }


def _heat(number: int) -> int:
    """Return how much a count stands out, from 0 to 3."""
    return sum(number >= least for least in (1, 10, 100))


def kind(of: Kind, allowed: list[str], links: Links, *, using: str) -> dict[str, Any]:
    found = triage.kind(of, using=using)
    for event in found["examples"]:
        event["url"] = links.event(event["id"]) or links.page("explain", key=event["key"])
        event["when"] = wording.time(event["attempted_at"])
        event["duration"] = wording.duration(event["duration"])
    return {
        **found,
        "kind": of,
        "count": wording.number(found["failed"], is_bounded=found["is_bounded"]),
        "events": links.events(state="failed", **of._asdict()),
        **{name: links.of_kind(name, of) for name in allowed if found["failed"] or found["is_bounded"]},
    }


def preview(action: str, of: Kind, *, using: str) -> dict[str, Any]:
    """Return what a repair would do."""
    failed, is_bounded = triage.count(of, using=using)
    return {
        "kind": of,
        "action": action,
        "place": Place(),
        "is_empty": not failed and not is_bounded,
        "number": failed,
        "total": 0 if is_bounded else failed,
        "count": wording.number(failed, is_bounded=is_bounded),
    }


def step(request: HttpRequest, action: str, of: Kind, *, using: str) -> dict[str, Any]:
    """Do a step of a repair, and return how far it is. Raises BadRequest."""
    asked = request.POST
    place = Place(
        _asked_time(asked.get("after", "-infinity")),
        _asked_number(asked.get("after_id", "0")),
        _asked_time(asked.get("until", "now")),
    )
    why = asked.get("why", "").replace("\x00", "").strip()
    if action == "discard" and not why:
        raise BadRequest(_("Say why the events are discarded."))
    reason = f"{request.user.get_username()}: {why}" if action == "discard" else None
    with transaction.atomic(using=using):
        done = triage.step(of, place, reason, using=using)
        if done.changed:
            _log(request, action, of, len(done.changed), why)
    changed = _asked_number(asked.get("changed", "0")) + len(done.changed)
    total = max(_asked_number(asked.get("total", "0")), 0)
    left_out = _asked_number(asked.get("left_out", "0")) + done.left_out
    return {
        "kind": of,
        "action": action,
        "has_begun": True,
        "place": done.place,
        "is_finished": done.place is None,
        "changed": changed,
        "changed_text": wording.number(changed),
        "total": total,
        "total_text": wording.number(total),
        "left_out": left_out,
        "notices": done.notices,
        "why": why,
    }


def _log(request: HttpRequest, action: str, of: Kind, number: int, why: str) -> None:
    if action == "retry":
        message = ngettext("Retried %(number)d event.", "Retried %(number)d events.", number)
    else:
        message = ngettext(
            "Discarded %(number)d event: %(why)s", "Discarded %(number)d events: %(why)s", number
        )
    what = f"{of.handler}: {of.fingerprint}"
    entry(request, what, message % {"number": number, "why": why}).save()


def _asked_time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise BadRequest(text)
    return text


def _asked_number(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
        raise BadRequest(text)
    return int(text)
