"""The outbox tables: their columns, constraints and indexes. All queries on them are in the store.

An event's status:

    pending ──> done         every handler that matched succeeded, or discarded it
       │  ├───> failed       a handler is out of attempts, and no other is left to run: a dead letter
       │  ├───> discarded    every handler discarded it, or a person did
       │  ├───> unhandled    no handler matched its group; a worker that starts with one makes it pending
       │  ╰───> running      a detached handler is at work; pending again when this or its worker ends
       ╰─ again at available_at, after a handler failed

`available_at` NULL means ready now; a time means delayed, or a retry at that time.
"""

from collections.abc import Mapping
from typing import Any

from django.db import models
from django.db.models import Q
from django.db.models.expressions import RawSQL
from django.db.models.functions import Length
from django.db.models.lookups import GreaterThanOrEqual, LessThanOrEqual
from django.utils.translation import gettext_lazy as _

from spark_outbox.events.event import MAX_LENGTH
from spark_outbox.events.event import Event as StoredEvent

EMPTY_OBJECT = RawSQL("'{}'::jsonb", ())
EMPTY_LIST = RawSQL("'[]'::jsonb", ())
NOW = RawSQL("statement_timestamp()", ())  # not now(): a transaction may be hours old


class EventStatus(models.TextChoices):
    PENDING = "pending", _("Pending")
    DONE = "done", _("Done")
    FAILED = "failed", _("Failed")
    UNHANDLED = "unhandled", _("Unhandled")
    RUNNING = "running", _("Running")
    DISCARDED = "discarded", _("Discarded")


class DeliveryStatus(models.TextChoices):
    PENDING = "pending", _("Pending")
    DONE = "done", _("Done")
    FAILED = "failed", _("Failed")
    RUNNING = "running", _("Running")
    DISCARDED = "discarded", _("Discarded")


class PauseKind(models.TextChoices):
    HANDLER = "handler"
    GROUP = "group"


def _status(choices: type[models.TextChoices]) -> "models.TextField[str, str]":
    return models.TextField(choices=choices, db_default=choices["PENDING"])


def _bounded(name: str, *, table: str) -> models.CheckConstraint:
    length = Length(name)
    return models.CheckConstraint(
        name=f"{table}_{name}_length",
        condition=Q(GreaterThanOrEqual(length, 1), LessThanOrEqual(length, MAX_LENGTH)),
    )


class OutboxEvents(models.QuerySet["OutboxEvent"]):
    def create_if_new(self, event: Mapping[str, Any]) -> "OutboxEvent | None":
        """Remember the key of an event of django-spark's shape; return the row, or None if it was known.

        The caller handles the event: no worker does. It is for code that was written for django-spark;
        other code emits.
        """
        from spark_outbox.emitting.remembering import remember

        self._for_write = True
        new = remember(event, using=self.db)
        return None if new is None else self.get(key=new.key)

    def past(self, group: str, key: str = "") -> "StoredEvent | None":
        """Return an event as handlers get it, but without what the setting REDACT hides.

        It is the one with this key, or the latest of the group; None if there is none whose payload can
        be shown. It reads a bounded number of rows. Each query that follows in the same transaction has
        10 seconds, too.
        """
        from spark_outbox.operating.look import past_event

        self._for_write = True  # a replica may be late
        return past_event(group, key, using=self.db)


class OutboxEvent(models.Model):
    """An event as it is stored; handlers see it as spark_outbox.Event."""

    id = models.BigAutoField(primary_key=True)
    key = models.TextField()
    group = models.TextField(db_column="event_group")
    payload = models.JSONField(db_default=EMPTY_OBJECT)
    headers = models.JSONField(db_default=EMPTY_OBJECT)
    status = _status(EventStatus)
    attempts = models.IntegerField(db_default=0)
    available_at = models.DateTimeField(null=True, blank=True)
    ordering_key = models.TextField(null=True, blank=True)  # noqa: DJ001, NULL is "no order"
    created_at = models.DateTimeField(db_default=NOW)
    finished_at = models.DateTimeField(null=True, blank=True)
    last_error = models.TextField(db_default="", blank=True)
    key_is_generated = models.BooleanField(db_default=False)
    """Nobody can emit the key again: it need not be kept when the event is pruned."""
    digest = models.BigIntegerField(null=True, blank=True)
    """A hash of group and payload, in a pruned event: of that, the rest is empty."""

    objects = OutboxEvents.as_manager()

    class Meta:
        db_table = "spark_outbox_event"
        required_db_vendor = "postgresql"  # `migrate` skips other databases
        verbose_name = _("event")
        verbose_name_plural = _("events")
        default_permissions = ("view",)  # nobody adds, changes or deletes events in the admin
        permissions = [
            ("retry_outboxevent", "Can retry events"),
            ("discard_outboxevent", "Can discard events"),
            ("replay_outboxevent", "Can replay events"),
            ("rehearse_outboxevent", "Can rehearse a handler on events"),
        ]
        constraints = [
            # Not unique=True: that adds a second index, for LIKE, which each emit would pay for.
            models.UniqueConstraint(fields=["key"], name="spark_outbox_event_key"),
            _bounded("key", table="spark_outbox_event"),
            _bounded("group", table="spark_outbox_event"),
            _bounded("ordering_key", table="spark_outbox_event"),
            models.CheckConstraint(
                name="spark_outbox_event_status", condition=Q(status__in=EventStatus.values)
            ),
        ]
        indexes = [
            models.Index(
                name="spark_outbox_event_ready",
                fields=["id"],
                condition=Q(status="pending", available_at__isnull=True, ordering_key__isnull=True),
            ),
            models.Index(
                name="spark_outbox_event_due",
                fields=["available_at", "id"],
                condition=Q(status="pending", available_at__isnull=False, ordering_key__isnull=True),
            ),
            models.Index(
                name="spark_outbox_event_ordered",
                fields=["id"],
                condition=Q(status="pending", available_at__isnull=True, ordering_key__isnull=False),
            ),
            models.Index(
                name="spark_outbox_event_ordered_due",
                fields=["available_at", "id"],
                condition=Q(status="pending", available_at__isnull=False, ordering_key__isnull=False),
            ),
            models.Index(
                name="spark_outbox_event_order",
                fields=["ordering_key", "id"],
                condition=Q(ordering_key__isnull=False, status__in=["pending", "running", "failed"]),
            ),
            models.Index(  # one index for the rare statuses: each emit pays for each index
                name="spark_outbox_event_aside",
                fields=["status", "group", "finished_at"],
                condition=Q(status__in=["running", "unhandled", "failed"]),
            ),
            models.Index(
                name="spark_outbox_event_done",
                fields=["group", "finished_at"],
                condition=Q(status="done", digest__isnull=True),
            ),
            models.Index(
                name="spark_outbox_event_discarded",
                fields=["group", "finished_at"],
                condition=Q(status="discarded", digest__isnull=True),
            ),
        ]

    def __str__(self) -> str:
        return self.key


Event = OutboxEvent  # its name in django-spark


class Dashboard(OutboxEvent):
    """The dashboard's entry in the admin, with the permission to see it. It is no table."""

    class Meta:
        proxy = True
        default_permissions = ("view",)
        verbose_name = _("dashboard")
        verbose_name_plural = _("dashboard")


class Delivery(models.Model):
    """One handler's work on one event. Not stored if all handlers of the event succeed at once."""

    id = models.BigAutoField(primary_key=True)
    # The migration adds the foreign key, with ON DELETE CASCADE: plain SQL may delete events.
    event = models.ForeignKey(
        OutboxEvent,
        on_delete=models.CASCADE,
        related_name="deliveries",
        db_constraint=False,
        db_index=False,
    )
    handler = models.TextField()
    status = _status(DeliveryStatus)
    attempts = models.IntegerField(db_default=0)
    available_at = models.DateTimeField(null=True, blank=True)
    attempted_at = models.DateTimeField(db_default=NOW)
    duration = models.DurationField(null=True, blank=True)
    worker = models.TextField(db_default="", blank=True)
    session = models.IntegerField(null=True, blank=True)
    error = models.TextField(db_default="", blank=True)
    traceback = models.TextField(db_default="", blank=True)

    class Meta:
        db_table = "spark_outbox_delivery"
        required_db_vendor = "postgresql"
        verbose_name = _("delivery")
        verbose_name_plural = _("deliveries")
        default_permissions = ("view",)
        constraints = [
            models.UniqueConstraint(
                fields=["event", "handler"], name="spark_outbox_delivery_event_handler"
            ),
            models.CheckConstraint(
                name="spark_outbox_delivery_status", condition=Q(status__in=DeliveryStatus.values)
            ),
        ]
        indexes = [
            models.Index(
                name="spark_outbox_delivery_running", fields=["session"], condition=Q(status="running")
            )
        ]

    def __str__(self) -> str:
        return f"{self.handler} of event {self.event_id}"


class WorkerSession(models.Model):
    """A worker that is alive, or has died without stopping by itself; see worker/crashes.py."""

    session = models.IntegerField(primary_key=True)
    """The number of an advisory lock that the worker holds while it lives."""
    name = models.TextField()
    """Its host and process: `host:pid`."""
    started_at = models.DateTimeField(db_default=NOW)
    version = models.TextField(db_default="", blank=True)
    """That of spark_outbox."""
    backend = models.IntegerField(null=True, blank=True)
    """The server's process of the worker's own connection; NULL if that is a pooler's."""
    groups = models.TextField(null=True, blank=True)  # noqa: DJ001, NULL is all groups
    handlers = models.JSONField(db_default=EMPTY_LIST)
    """The names of its handlers."""
    event_id = models.BigIntegerField(null=True, blank=True)
    """The event of the current call, if the worker notes its calls here, or the call has been under way
    for a while; else NULL, and no handler."""
    handler = models.TextField(db_default="", blank=True)
    called_at = models.DateTimeField(null=True, blank=True)
    """Since when, if it has been under way for a while."""
    times = models.IntegerField(db_default=0)
    """How often in a row this call has been made and noted, by any worker."""

    class Meta:
        db_table = "spark_outbox_session"
        required_db_vendor = "postgresql"

    def __str__(self) -> str:
        return self.name


class Pause(models.Model):
    """A handler or a group that is paused by hand; see worker/pauses.py."""

    id = models.BigAutoField(primary_key=True)
    """No two pauses ever have the same: it is in the mark of what waits for this one."""
    kind = models.TextField(choices=PauseKind)
    name = models.TextField()
    """The handler's, or all of the group's: no pattern."""
    why = models.TextField(db_default="", blank=True)
    paused_by = models.TextField(db_default=RawSQL("session_user", ()))
    paused_at = models.DateTimeField(db_default=NOW)

    class Meta:
        db_table = "spark_outbox_pause"
        required_db_vendor = "postgresql"
        constraints = [
            models.UniqueConstraint(fields=["kind", "name"], name="spark_outbox_pause_kind_name"),
            models.CheckConstraint(
                name="spark_outbox_pause_kind", condition=Q(kind__in=PauseKind.values)
            ),
            _bounded("name", table="spark_outbox_pause"),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"
