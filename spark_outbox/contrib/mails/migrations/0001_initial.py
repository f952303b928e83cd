"""The table of mails."""

from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Mail",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "event_group",
                    models.CharField(
                        help_text="The whole name, not a pattern.",
                        max_length=255,
                        unique=True,
                        verbose_name="event group",
                    ),
                ),
                (
                    "is_active",
                    models.BooleanField(
                        default=True,
                        help_text="A mail that is not active is not sent.",
                        verbose_name="active",
                    ),
                ),
                (
                    "from_email",
                    models.CharField(
                        blank=True,
                        help_text="If it is empty, it is DEFAULT_FROM_EMAIL of the settings.",
                        max_length=255,
                        verbose_name="sender",
                    ),
                ),
                (
                    "subject",
                    models.CharField(
                        help_text=(
                            "Subject, text and HTML are Django templates. Their variables are the "
                            "values of the event, and group, key and recipient."
                        ),
                        max_length=255,
                        verbose_name="subject",
                    ),
                ),
                ("body", models.TextField(verbose_name="text")),
                (
                    "html",
                    models.TextField(
                        blank=True,
                        help_text="Mail programs show it in place of the text, if they can.",
                        verbose_name="HTML",
                    ),
                ),
            ],
            options={
                "verbose_name": "mail",
                "verbose_name_plural": "mails",
                "db_table": "spark_outbox_mail",
            },
        ),
    ]
