"""How this code fits what is stored: what would become of pending events if it were deployed.

Looks at the oldest checking.LOOKED_AT pending events of each kind. Fetches no instances, and decodes no
payloads and headers over 8 KB.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from spark_outbox import conf
from spark_outbox.errors import UnreadablePayload
from spark_outbox.events.event import Event
from spark_outbox.events.references import References
from spark_outbox.registry.handlers import Registry
from spark_outbox.store import checking
from spark_outbox.store.checking import Counted, Pending

CHUNK = 500
"""How many payloads are in memory at once."""


@dataclass(slots=True)
class Misfits:
    """What does not fit. Each list is empty if all is well."""

    idle: list[str] = field(default_factory=list)
    """The handlers that match no group of the last two weeks; none, if not all groups are known."""
    strange: list[str] = field(default_factory=list)
    """The groups of ended events that no handler matches."""
    unmatched: list[Counted] = field(default_factory=list)
    """The groups of pending events that no handler matches."""
    unreadable: list[Counted] = field(default_factory=list)
    """The groups of pending events that can't be decoded."""
    owed: list[Counted] = field(default_factory=list)
    """The handlers that are not there, to which pending events are owed."""
    hidden: list[str] = field(default_factory=list)
    """What this role may not read."""


def misfits(registry: Registry, *, using: str) -> Misfits:
    """Compare the handlers with what is stored. A project without handlers only emits: all fits."""
    found = Misfits()
    if not registry.handlers:
        return found
    may = checking.readable(using=using)
    hidden = [what for what, is_readable in may._asdict().items() if not is_readable]
    if not may.events:
        found.hidden = hidden
        return found

    pending = checking.pending(using=using)
    recent = checking.recent_groups(using=using)
    names = [handler.name for handler in registry.handlers]
    found.unmatched = _counted(event for event in pending if not registry.handlers_for(event.group))
    groups = recent.groups | {event.group for event in pending}
    known = {unmatched.name for unmatched in found.unmatched}
    found.strange = sorted(group for group in recent.groups - known if not registry.handlers_for(group))
    is_kept = conf.current().RETENTION.shortest >= checking.RECENT.total_seconds()
    if groups and recent.are_all and is_kept and checking.is_old(using=using):
        busy = {handler.name for group in groups for handler in registry.handlers_for(group)}
        found.idle = [name for name in names if name not in busy]

    if pending:
        found.hidden = hidden
        found.owed = checking.owed(pending, names, using=using) if may.deliveries else []
        found.unreadable = _unreadable(pending, using=using) if may.payloads else []
    return found


def _unreadable(pending: list[Pending], *, using: str) -> list[Counted]:
    ids = [event.id for event in pending]
    found = []
    for start in range(0, len(ids), CHUNK):
        for row in checking.small_rows(ids[start : start + CHUNK], using=using):
            try:
                Event.from_row(row, References()).check()
            except UnreadablePayload:
                found.append(Pending(row.id, row.key, row.group))
    return _counted(found)


def _counted(events: Iterable[Pending]) -> list[Counted]:
    """Count them by group."""
    counts: dict[str, Counted] = {}
    for event in events:
        so_far = counts.get(event.group, Counted(event.group, 0, event.key))
        counts[event.group] = so_far._replace(number=so_far.number + 1)
    return sorted(counts.values())
