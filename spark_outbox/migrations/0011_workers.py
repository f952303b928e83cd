"""A row for each worker that lives, which tells of those that did not stop by themselves."""

from django.db import migrations, models
from django.db.models.expressions import RawSQL


class Migration(migrations.Migration):
    dependencies = [("spark_outbox", "0010_index_of_running")]

    operations = [
        migrations.CreateModel(
            name="WorkerSession",
            fields=[
                ("session", models.IntegerField(primary_key=True, serialize=False)),
                ("name", models.TextField()),
                ("started_at", models.DateTimeField(db_default=RawSQL("statement_timestamp()", ()))),
                ("event_id", models.BigIntegerField(blank=True, null=True)),
                ("handler", models.TextField(blank=True, db_default="")),
            ],
            options={"db_table": "spark_outbox_session", "required_db_vendor": "postgresql"},
        ),
    ]
