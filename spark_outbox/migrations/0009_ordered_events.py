"""Indexes from which each kind of event is claimed in its turn, and none of another kind is read.

Ordered events have two of their own: a look for them begins with those that are ready or due, rather
than with all ordering keys. Due events are read a piece at a time, which the id makes possible where
many have the same time.
"""

from django.db import migrations, models
from django.db.models import Q

DUE = "spark_outbox_event_due"


class Migration(migrations.Migration):
    dependencies = [("spark_outbox", "0008_circuits")]

    operations = [
        migrations.RemoveIndex("outboxevent", DUE),
        migrations.AddIndex(
            "outboxevent",
            models.Index(
                name=DUE,
                fields=["available_at", "id"],
                condition=Q(status="pending", available_at__isnull=False, ordering_key__isnull=True),
            ),
        ),
        migrations.AddIndex(
            "outboxevent",
            models.Index(
                name="spark_outbox_event_ordered",
                fields=["id"],
                condition=Q(status="pending", available_at__isnull=True, ordering_key__isnull=False),
            ),
        ),
        migrations.AddIndex(
            "outboxevent",
            models.Index(
                name="spark_outbox_event_ordered_due",
                fields=["available_at", "id"],
                condition=Q(status="pending", available_at__isnull=False, ordering_key__isnull=False),
            ),
        ),
    ]
