"""Where the outbox is, who may do what to it, and the admin's log of that."""

from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.db import router
from django.http import HttpRequest

from spark_outbox.models import OutboxEvent


def alias() -> str:
    """Return the database of the outbox: the one that is written, as others know no workers."""
    return router.db_for_write(OutboxEvent)


def may(request: HttpRequest, name: str) -> bool:
    return request.user.has_perm(f"spark_outbox.{name}_outboxevent")


def entry(request: HttpRequest, what: str, message: str, *, event_id: int | None = None) -> LogEntry:
    """Return an entry of the log, not saved yet: of one event, or of several."""
    return LogEntry(
        user_id=request.user.pk or 0,  # nobody comes here without a login
        content_type=ContentType.objects.get_for_model(OutboxEvent),
        object_id=None if event_id is None else str(event_id),
        object_repr=what[:200],
        action_flag=CHANGE,
        change_message=message,
    )
