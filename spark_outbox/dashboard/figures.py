"""What the dashboard shows, in words: for the template, from operating/glance.py."""

from collections import Counter
from typing import Any

from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from spark_outbox.dashboard import charts, wording
from spark_outbox.dashboard.links import Links
from spark_outbox.operating.glance import COUNTS, SHOWN, Glance
from spark_outbox.operating.look import BY_SEVERITY
from spark_outbox.store.flowing import GROUPS
from spark_outbox.store.viewing import LOOKED_AT, Row

LABELS = {
    "ready": gettext_lazy("ready"),
    "running": gettext_lazy("running"),
    "failed": gettext_lazy("failed"),
    "done_last_hour": gettext_lazy("done in the last hour"),
    "delayed": gettext_lazy("delayed"),
    "retrying": gettext_lazy("to be retried"),
    "unhandled": gettext_lazy("unhandled"),
    "waits_for_circuit": gettext_lazy("wait for a circuit"),
    "paused": gettext_lazy("paused"),
}

SEVERITIES = {
    "ok": gettext_lazy("well"),
    "warning": gettext_lazy("warning"),
    "critical": gettext_lazy("critical"),
}

STATES = {
    "busy": gettext_lazy("busy"),
    "resting": gettext_lazy("resting"),
    "watch": gettext_lazy("on watch"),
    "gone": gettext_lazy("gone"),
    "unknown": gettext_lazy("unknown"),
}


def context(glance: Glance, links: Links) -> dict[str, Any]:
    wrong = sorted(
        (check for check in glance.health if check["status"] != "ok"),
        key=lambda check: -BY_SEVERITY.index(check["status"]),
    )
    for check in glance.health:
        check["severity"] = SEVERITIES[check["status"]]
        check["url"] = links.page("triage") if check["name"] in ("failed", "circuits") else ""
    return {
        "headline": _headline(wrong),
        "summary": _summary(glance, wrong),
        "worst": wrong[0]["status"] if wrong else "ok",
        "wrong": wrong,
        "well": [check for check in glance.health if check["status"] == "ok"],
        "tiles": _tiles(glance, wrong, links),
        "charts": [
            charts.chart(glance.flows.minutes, unit="minute"),
            charts.chart(glance.flows.hours, unit="hour"),
        ],
        "sampled_groups": GROUPS if glance.flows.groups_left_out else 0,
        "groups": [_group(row) for row in glance.groups],
        "handlers": [_handler(row, links) for row in glance.handlers],
        "workers": [_worker(row) for row in glance.workers],
        "pauses": [{**row, "since": wording.time(row["paused_at"])} for row in glance.pauses],
        "snapshots": [{**row, "age": wording.age(row["held_for"])} for row in glance.snapshots],
        "labels": [LABELS[name] for name in COUNTS],
        "more": glance.more,
        "shown": SHOWN,
    }


def _headline(wrong: list[Row]) -> str:
    """Return a line that changes only if something has happened."""
    if not wrong:
        return _("All is well.")
    counts = Counter(check["status"] for check in wrong)
    parts = []
    if number := counts["critical"]:
        parts.append(ngettext("%(number)d critical", "%(number)d critical", number) % {"number": number})
    if number := counts["warning"]:
        parts.append(ngettext("%(number)d warning", "%(number)d warnings", number) % {"number": number})
    return f"{', '.join(parts)}: {', '.join(check['name'] for check in wrong)}"


def _summary(glance: Glance, wrong: list[Row]) -> str:
    """Return what is said to those who do not see the page, as often as it changes."""
    failed = glance.totals["failed"]
    if not failed:
        return _headline(wrong)
    text = ngettext("%(number)s event has failed.", "%(number)s events have failed.", failed)
    count = wording.number(failed, is_bounded="failed" in glance.bounded)
    return f"{_headline(wrong)}. {text % {'number': count}}"


def _tiles(glance: Glance, wrong: list[Row], links: Links) -> list[dict[str, Any]]:
    levels = {check["name"]: check["status"] for check in wrong}
    urls = {
        "failed": links.page("triage"),
        "unhandled": links.events(state="unhandled"),
        "running": links.events(state="running"),
    }
    checks = {"waits_for_circuit": "circuits", "paused": "pauses"}
    late = {
        "name": "late",
        "label": _("late"),
        "value": wording.age(glance.late) or "0",
        "is_none": not glance.late,
        "level": levels.get("lag", ""),
        "url": "",
    }
    return [
        late,
        *(
            {
                "name": name,
                "label": label,
                "value": wording.number(glance.totals[name], is_bounded=name in glance.bounded),
                "is_none": not glance.totals[name],
                "level": levels.get(checks.get(name, name), "") if glance.totals[name] else "",
                "url": urls.get(name, ""),
            }
            for name, label in LABELS.items()
        ),
    ]


def _group(row: Row) -> dict[str, Any]:
    return {
        "name": row["group"],
        "late": wording.age(row["late"]),
        "cells": [
            {
                "label": LABELS[name],
                "value": wording.number(row[name], is_bounded=row[name] >= LOOKED_AT),
                "is_zero": not row[name],
                "is_bad": bool(row[name]) and name in ("failed", "unhandled"),
            }
            for name in COUNTS
        ],
        "per_minute": _per_minute(row["done"]),
        "p50": wording.duration(row["p50"]),
        "p95": wording.duration(row["p95"]),
    }


def _handler(row: Row, links: Links) -> dict[str, Any]:
    return {
        **row,
        "per_minute": "" if row["done"] is None else _per_minute(row["done"]),
        "is_known": row["done"] is not None,
        "failing": [
            {
                "label": LABELS[name],
                "value": wording.number(row[name], is_bounded=row["is_bounded"] and row[name] > 0),
                "is_zero": not row[name],
                "is_bad": name == "failed",
            }
            for name in ("failed", "retrying")
        ],
        "p50": wording.duration(row["p50"]),
        "p95": wording.duration(row["p95"]),
        "events": links.events(handler=row["name"]),
    }


def _worker(row: Row) -> dict[str, Any]:
    return {
        **row,
        "state_text": STATES.get(row["state"], row["state"]),
        "since": wording.time(row["started_at"]),
        "state_for": wording.age(row["state_for"]),
        "in_hand": wording.age(row["in_hand_seconds"]),
        "is_gone": row["state"] == "gone",
    }


def _per_minute(in_an_hour: int) -> str:
    rate = in_an_hour / 60
    return wording.number(round(rate)) if rate >= 10 else f"{rate:.1f}"
