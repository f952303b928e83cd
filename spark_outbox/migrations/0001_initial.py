"""The outbox: its tables, indexes and constraints. Its trigger, functions and view are SQL, in sql/."""

from django.db import migrations, models
from django.db.models import Q
from django.db.models.expressions import RawSQL
from django.db.models.functions import Length
from django.db.models.lookups import GreaterThanOrEqual, LessThanOrEqual

from spark_outbox.migrations._postgresql import run_file

EMPTY_OBJECT = RawSQL("'{}'::jsonb", ())
EMPTY_LIST = RawSQL("'[]'::jsonb", ())
NOW = RawSQL("statement_timestamp()", ())


def bounded(column: str) -> Q:
    """Return the condition that a text has 1 to 255 characters."""
    return Q(GreaterThanOrEqual(Length(column), 1), LessThanOrEqual(Length(column), 255))


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="OutboxEvent",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("key", models.TextField()),
                ("group", models.TextField(db_column="event_group")),
                ("payload", models.JSONField(db_default=EMPTY_OBJECT)),
                ("headers", models.JSONField(db_default=EMPTY_OBJECT)),
                (
                    "status",
                    models.TextField(
                        choices=[
                            ("pending", "Pending"),
                            ("done", "Done"),
                            ("failed", "Failed"),
                            ("unhandled", "Unhandled"),
                            ("running", "Running"),
                            ("discarded", "Discarded"),
                        ],
                        db_default="pending",
                    ),
                ),
                ("attempts", models.IntegerField(db_default=0)),
                ("available_at", models.DateTimeField(blank=True, null=True)),
                ("ordering_key", models.TextField(blank=True, null=True)),
                ("created_at", models.DateTimeField(db_default=NOW)),
                ("finished_at", models.DateTimeField(blank=True, null=True)),
                ("last_error", models.TextField(blank=True, db_default="")),
                ("key_is_generated", models.BooleanField(db_default=False)),
                ("digest", models.BigIntegerField(blank=True, null=True)),
            ],
            options={
                "verbose_name": "event",
                "verbose_name_plural": "events",
                "default_permissions": ("view",),
                "permissions": [
                    ("retry_outboxevent", "Can retry events"),
                    ("discard_outboxevent", "Can discard events"),
                    ("replay_outboxevent", "Can replay events"),
                    ("rehearse_outboxevent", "Can rehearse a handler on events"),
                ],
                "db_table": "spark_outbox_event",
                "required_db_vendor": "postgresql",
                "constraints": [
                    models.UniqueConstraint(name="spark_outbox_event_key", fields=["key"]),
                    models.CheckConstraint(
                        name="spark_outbox_event_key_length", condition=bounded("key")
                    ),
                    models.CheckConstraint(
                        name="spark_outbox_event_group_length", condition=bounded("group")
                    ),
                    models.CheckConstraint(
                        name="spark_outbox_event_ordering_key_length", condition=bounded("ordering_key")
                    ),
                    models.CheckConstraint(
                        name="spark_outbox_event_status",
                        condition=Q(
                            status__in=[
                                "pending",
                                "done",
                                "failed",
                                "unhandled",
                                "running",
                                "discarded",
                            ]
                        ),
                    ),
                ],
                # Each kind of event is claimed from an index of its own, which holds no other kind.
                # The id lets a claim of due events go on where the last one ended, within one time.
                "indexes": [
                    models.Index(
                        name="spark_outbox_event_ready",
                        fields=["id"],
                        condition=Q(
                            status="pending", available_at__isnull=True, ordering_key__isnull=True
                        ),
                    ),
                    models.Index(
                        name="spark_outbox_event_due",
                        fields=["available_at", "id"],
                        condition=Q(
                            status="pending", available_at__isnull=False, ordering_key__isnull=True
                        ),
                    ),
                    models.Index(
                        name="spark_outbox_event_ordered",
                        fields=["id"],
                        condition=Q(
                            status="pending", available_at__isnull=True, ordering_key__isnull=False
                        ),
                    ),
                    models.Index(
                        name="spark_outbox_event_ordered_due",
                        fields=["available_at", "id"],
                        condition=Q(
                            status="pending", available_at__isnull=False, ordering_key__isnull=False
                        ),
                    ),
                    models.Index(
                        name="spark_outbox_event_order",
                        fields=["ordering_key", "id"],
                        condition=Q(
                            ordering_key__isnull=False, status__in=["pending", "running", "failed"]
                        ),
                    ),
                    models.Index(
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
                ],
            },
        ),
        migrations.CreateModel(
            name="Delivery",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                (
                    "event",
                    models.ForeignKey(
                        db_constraint=False,  # sql/0001_tables.sql adds it
                        db_index=False,
                        on_delete=models.CASCADE,
                        related_name="deliveries",
                        to="spark_outbox.outboxevent",
                    ),
                ),
                ("handler", models.TextField()),
                (
                    "status",
                    models.TextField(
                        choices=[
                            ("pending", "Pending"),
                            ("done", "Done"),
                            ("failed", "Failed"),
                            ("running", "Running"),
                            ("discarded", "Discarded"),
                        ],
                        db_default="pending",
                    ),
                ),
                ("attempts", models.IntegerField(db_default=0)),
                ("available_at", models.DateTimeField(blank=True, null=True)),
                ("attempted_at", models.DateTimeField(db_default=NOW)),
                ("duration", models.DurationField(blank=True, null=True)),
                ("worker", models.TextField(blank=True, db_default="")),
                ("session", models.IntegerField(blank=True, null=True)),
                ("error", models.TextField(blank=True, db_default="")),
                ("traceback", models.TextField(blank=True, db_default="")),
            ],
            options={
                "verbose_name": "delivery",
                "verbose_name_plural": "deliveries",
                "default_permissions": ("view",),
                "db_table": "spark_outbox_delivery",
                "required_db_vendor": "postgresql",
                "constraints": [
                    models.UniqueConstraint(
                        name="spark_outbox_delivery_event_handler", fields=["event", "handler"]
                    ),
                    models.CheckConstraint(
                        name="spark_outbox_delivery_status",
                        condition=Q(status__in=["pending", "done", "failed", "running", "discarded"]),
                    ),
                ],
                "indexes": [
                    models.Index(
                        name="spark_outbox_delivery_running",
                        fields=["session"],
                        condition=Q(status="running"),
                    ),
                ],
            },
        ),
        migrations.CreateModel(
            name="WorkerSession",
            fields=[
                ("session", models.IntegerField(primary_key=True, serialize=False)),
                ("name", models.TextField()),
                ("started_at", models.DateTimeField(db_default=NOW)),
                ("version", models.TextField(blank=True, db_default="")),
                ("backend", models.IntegerField(blank=True, null=True)),
                ("groups", models.TextField(blank=True, null=True)),
                ("handlers", models.JSONField(db_default=EMPTY_LIST)),
                ("event_id", models.BigIntegerField(blank=True, null=True)),
                ("handler", models.TextField(blank=True, db_default="")),
                ("called_at", models.DateTimeField(blank=True, null=True)),
                ("times", models.IntegerField(db_default=0)),
            ],
            options={"db_table": "spark_outbox_session", "required_db_vendor": "postgresql"},
        ),
        migrations.CreateModel(
            name="Pause",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                (
                    "kind",
                    models.TextField(choices=[("handler", "Handler"), ("group", "Group")]),
                ),
                ("name", models.TextField()),
                ("why", models.TextField(blank=True, db_default="")),
                ("paused_by", models.TextField(db_default=RawSQL("session_user", ()))),
                ("paused_at", models.DateTimeField(db_default=NOW)),
            ],
            options={
                "db_table": "spark_outbox_pause",
                "required_db_vendor": "postgresql",
                "constraints": [
                    models.UniqueConstraint(
                        name="spark_outbox_pause_kind_name", fields=["kind", "name"]
                    ),
                    models.CheckConstraint(
                        name="spark_outbox_pause_kind", condition=Q(kind__in=["handler", "group"])
                    ),
                    models.CheckConstraint(
                        name="spark_outbox_pause_name_length", condition=bounded("name")
                    ),
                ],
            },
        ),
        migrations.CreateModel(
            name="Dashboard",
            fields=[],
            options={
                "proxy": True,
                "default_permissions": ("view",),
                "verbose_name": "dashboard",
                "verbose_name_plural": "dashboard",
                "indexes": [],
                "constraints": [],
            },
            bases=("spark_outbox.outboxevent",),
        ),
        run_file("0001_tables"),
        run_file("0001_wake"),
        run_file("0001_emitting"),
        run_file("0001_circuits"),
        run_file("0001_pauses"),
        run_file("0001_retention"),
        run_file("0001_status"),
        run_file("0001_repair"),
        run_file("0001_health"),
    ]
