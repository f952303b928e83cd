"""Django's app config. The label is not that of django-spark's app: its table can stay beside ours."""

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class MailsConfig(AppConfig):
    name = "spark_outbox.contrib.mails"
    label = "spark_outbox_mails"
    verbose_name = _("Mails")
    default_auto_field = "django.db.models.BigAutoField"
