"""The outbox at a glance: what the dashboard shows. Reads a bounded number of rows, within a time."""

from collections import defaultdict
from typing import NamedTuple

from spark_outbox.operating import look
from spark_outbox.operating.patience import in_time
from spark_outbox.registry.handlers import registry
from spark_outbox.store import flowing, triaging, viewing
from spark_outbox.store.triaging import KINDS
from spark_outbox.store.viewing import Row

SHOWN = 200
"""The most groups, handlers and workers that are shown."""

COUNTS = (
    "ready",
    "delayed",
    "retrying",
    "running",
    "failed",
    "unhandled",
    "waits_for_circuit",
    "paused",
)


class Flow(NamedTuple):
    """Events of a minute or an hour, emitted and done."""

    arrived: int = 0
    done: int = 0
    is_estimate: bool = False


class Flows(NamedTuple):
    """The last 60 minutes and 24 hours, the latest first."""

    minutes: list[Flow]
    hours: list[Flow]
    done_by_group: dict[str, int]
    """In the last 60 minutes."""
    groups_left_out: bool
    """More groups had done events than are counted."""


def flows(*, using: str) -> Flows:
    done = flowing.done(using=using)
    by_group: dict[str, int] = defaultdict(int)
    for row in done:
        if row["kind"] == "minute":
            by_group[row["group"]] += row["amount"]
    counts: dict[tuple[str, int], Flow] = defaultdict(Flow)
    for name, found in (("arrived", flowing.arrived(using=using)), ("done", done)):
        for row in found:
            place = row["kind"], row["n"]
            flow = counts[place]
            counts[place] = flow._replace(
                **{name: getattr(flow, name) + row["amount"]},
                is_estimate=flow.is_estimate or row["is_estimate"],
            )
    return Flows(
        [counts["minute", n] for n in range(60)],
        [counts["hour", n] for n in range(24)],
        dict(by_group),
        len({row["group"] for row in done}) >= flowing.GROUPS,
    )


class Glance(NamedTuple):
    """What the dashboard shows."""

    health: list[Row]
    totals: dict[str, int]
    """The sum of each of COUNTS, and `done_last_hour`."""
    bounded: frozenset[str]
    """Those of which there may be more."""
    late: float | None
    """Seconds."""
    groups: list[Row]
    """As in spark_outbox_status, with `done`: how many were done in an hour, counted or estimated; and
    with `p50` and `p95`: the seconds from ready until done."""
    handlers: list[Row]
    workers: list[Row]
    pauses: list[Row]
    snapshots: list[Row]
    flows: Flows
    more: list[str]
    """Which of these lists are longer than what is shown."""


def glance(*, using: str) -> Glance:
    """Look at everything. Raises TooSlow."""
    with in_time(using=using):
        groups = viewing.rows(viewing.STATUS, using=using)
        flow = flows(using=using)
        waits = {row["group"]: row for row in flowing.waits(using=using)}
        for row in groups:
            of_it = waits.get(row["group"], {})
            row |= {name: of_it.get(name) for name in ("p50", "p95")}
            row["done"] = max(flow.done_by_group.get(row["group"], 0), row["done_last_hour"])
        lists = {
            "groups": groups,
            "handlers": handlers(groups, triaging.failures(using=using), using=using),
            "workers": viewing.rows(viewing.WORKERS, using=using),
            "pauses": viewing.rows(viewing.PAUSES, using=using),
        }
        names = (*COUNTS, "done_last_hour")
        late = [row["late"] for row in groups if row["late"] is not None]
        return Glance(
            health=look.health(using=using),
            totals={name: sum(row[name] for row in groups) for name in names},
            bounded=frozenset(
                name
                for name in names
                for row in groups
                if row[name] >= viewing.LOOKED_AT or (row["more"] and name in COUNTS[:3])
            ),
            late=max(late, default=None),
            snapshots=viewing.rows(viewing.SNAPSHOTS, using=using),
            flows=flow,
            more=[name for name, found in lists.items() if len(found) > SHOWN],
            **{name: found[:SHOWN] for name, found in lists.items()},
        )


def handlers(groups: list[Row], failures: list[Row], *, using: str) -> list[Row]:
    """Return what is known of each handler: of this process's code, of what fails, and of durations."""
    known: dict[str, Row] = {}

    def of(name: str) -> Row:
        counts = dict.fromkeys(("failed", "retrying", "circuit", "stored"), 0)
        nothing = dict.fromkeys(("done", "p50", "p95"))
        return known.setdefault(name, {"name": name, "is_bounded": False, **counts, **nothing})

    for handler in registry.handlers:
        matched = [row["done"] for row in groups if handler in registry.handlers_for(row["group"])]
        of(handler.name)["done"] = sum(matched)
    for kind in failures[:KINDS]:
        row = of(kind["handler"])
        row["is_bounded"] |= kind["looked_at"] >= triaging.COUNTED
        if kind["is_circuit"]:
            row["circuit"] += kind["retrying"]
        else:
            row["failed"] += kind["failed"]
            row["retrying"] += kind["retrying"]
    for times in flowing.durations(using=using):
        of(times["handler"]).update(stored=times["stored"], p50=times["p50"], p95=times["p95"])
    return list(known.values())
