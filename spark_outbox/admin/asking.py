"""What can be done to events, and what somebody wants done: which of the events it fits."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from spark_outbox.models import EventStatus
from spark_outbox.registry.handlers import Handler, registry
from spark_outbox.store.viewing import Row


@dataclass(frozen=True)
class Action:
    name: str
    label: Any
    """As people read it, in their language."""
    states: Collection[str]
    """In which an event must be, and not pruned."""
    has_handler: bool = False
    has_reason: bool = False

    def fits(self, event: Row) -> bool:
        return event["status"] in self.states and not event["is_pruned"]


ACTIONS = {
    action.name: action
    for action in (
        Action("retry", gettext_lazy("Retry…"), ("pending", "failed", "unhandled", "discarded")),
        Action("discard", gettext_lazy("Discard…"), ("pending", "failed", "unhandled"), has_reason=True),
        Action("replay", gettext_lazy("Replay to a handler…"), ("done",), has_handler=True),
        Action("rehearse", gettext_lazy("Rehearse…"), EventStatus.values, has_handler=True),
    )
}


class Asked(NamedTuple):
    """What somebody wants done."""

    action: Action
    events: list[Row]
    """All that were chosen."""
    back: str = ""
    """The query of the list from which they were chosen."""
    handler: Handler | None = None
    why: str = ""

    @property
    def fitting(self) -> list[Row]:
        """Those to which it can be done."""
        found = filter(self.action.fits, self.events)
        if self.handler is not None:
            found = filter(lambda event: self._matches(self.handler, event), found)
        return list(found)

    @property
    def handlers(self) -> list[Handler]:
        """The handlers that match any of them."""
        groups = {event["group"]: event for event in self.fitting}
        return [
            handler
            for handler in registry.handlers
            if any(self._matches(handler, event) for event in groups.values())
        ]

    @staticmethod
    def _matches(handler: Handler | None, event: Row) -> bool:
        return handler is not None and bool(handler.pattern.search(event["group"]))

    @property
    def problem(self) -> str:
        """Say what is missing."""
        if self.action.has_reason and not self.why:
            return _("Say why.")
        if self.action.has_handler and self.handler is None:
            return _("Choose a handler.")
        return ""
