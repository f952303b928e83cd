"""Running events have an index, which they share with unhandled ones: those that are stuck are found."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("spark_outbox", "0009_ordered_events")]

    operations = [
        migrations.RemoveIndex(model_name="outboxevent", name="spark_outbox_event_unhandled"),
        migrations.AddIndex(
            model_name="outboxevent",
            index=models.Index(
                condition=models.Q(("status__in", ["unhandled", "running"])),
                fields=["status", "group"],
                name="spark_outbox_event_aside",
            ),
        ),
    ]
