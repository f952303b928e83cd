"""The writers' rows, and the ledger of handlers' effects. No constraint: repetitions must show."""

from django.db import models
from django.db.models.expressions import RawSQL

CLOCK = RawSQL("clock_timestamp()", ())


class Order(models.Model):
    """One for each event, in the same transaction. So both exist, or neither."""

    objects: "models.Manager[Order]" = models.Manager()

    key = models.TextField(unique=True)
    group = models.TextField()
    delay = models.DurationField(null=True)
    ordering_key = models.TextField(null=True)  # noqa: DJ001, NULL is "no order"
    position = models.BigIntegerField(db_default=0)
    """Ascends in the order in which the writer emitted the events of this ordering key."""
    twin = models.TextField(default="", db_default="")
    """The key of an order whose event this one's source emits before its own."""
    created_at = models.DateTimeField(db_default=CLOCK)

    class Meta:
        db_table = "chaos_order"


class Effect(models.Model):
    """The effect of one handler on one event, in the worker's transaction."""

    objects: "models.Manager[Effect]" = models.Manager()

    key = models.TextField(db_index=True)
    handler = models.TextField()
    event_id = models.BigIntegerField()
    ordering_key = models.TextField(null=True)  # noqa: DJ001, NULL is "no order"
    transaction = models.BigIntegerField(db_default=RawSQL("pg_current_xact_id()::text::bigint", ()))
    at = models.DateTimeField(db_default=CLOCK)

    class Meta:
        db_table = "chaos_effect"


class Account(models.Model):
    """Two handlers lock two of these in opposite orders."""

    objects: "models.Manager[Account]" = models.Manager()

    balance = models.IntegerField(default=0)

    class Meta:
        db_table = "chaos_account"
