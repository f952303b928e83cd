"""Generators and their conditions."""

import django.db.models.deletion
from django.db import migrations, models

OPERATORS = [">", "<", ">=", "<=", "=", "!="]


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Generator",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                (
                    "group",
                    models.CharField(
                        "group",
                        max_length=200,
                        db_column="event_group",
                        help_text="Once for each candidate. In another group, all are new.",
                    ),
                ),
                ("source", models.CharField("source", max_length=100)),
                ("is_active", models.BooleanField("is active", default=False)),
            ],
            options={
                "db_table": "spark_outbox_generator",
                "required_db_vendor": "postgresql",
                "verbose_name": "generator",
                "verbose_name_plural": "generators",
                "permissions": [("preview_generator", "Can preview generators")],
            },
        ),
        migrations.CreateModel(
            name="Condition",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("variable", models.CharField("variable", max_length=100)),
                (
                    "operator",
                    models.TextField("operator", choices=[(each, each) for each in OPERATORS]),
                ),
                (
                    "value",
                    models.CharField(
                        "value",
                        max_length=255,
                        blank=True,
                        help_text="For example 5, 2.50, true, 2026-12-31 or 2026-12-31 18:00.",
                    ),
                ),
                (
                    "generator",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="conditions",
                        to="spark_outbox_generators.generator",
                        verbose_name="generator",
                    ),
                ),
            ],
            options={
                "db_table": "spark_outbox_condition",
                "required_db_vendor": "postgresql",
                "ordering": ["pk"],
                "verbose_name": "condition",
                "verbose_name_plural": "conditions",
                "constraints": [
                    models.CheckConstraint(
                        name="spark_outbox_condition_operator",
                        condition=models.Q(operator__in=OPERATORS),
                    )
                ],
            },
        ),
    ]
