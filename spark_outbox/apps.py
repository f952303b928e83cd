"""Wire the app into Django: checks, the post_save hook, autodiscovery, the trigger's mode."""

from typing import Any

from django.apps import AppConfig
from django.db import connections
from django.db.models.signals import post_migrate, post_save
from django.utils.module_loading import autodiscover_modules

from spark_outbox import checks, conf
from spark_outbox.emitting.emit import events_committed
from spark_outbox.emitting.sources import emit_on_save
from spark_outbox.store import checking, waking
from spark_outbox.worker.in_process import drain_after_commit


class SparkOutboxConfig(AppConfig):
    name = "spark_outbox"
    verbose_name = "Outbox"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        checks.register_checks()
        post_save.connect(emit_on_save, dispatch_uid="spark_outbox.emit_on_save")
        post_migrate.connect(apply_wake_mode, sender=self, dispatch_uid="spark_outbox.wake_mode")
        events_committed.connect(drain_after_commit, dispatch_uid="spark_outbox.drain")
        autodiscover_modules("sources", "handlers")


def apply_wake_mode(using: str, **_: Any) -> None:
    """After `migrate`, set the trigger to the mode of SPARK_OUTBOX["WAKE"]."""
    if connections[using].vendor != "postgresql" or not checking.has_outbox(using=using):
        return
    mode = conf.current().WAKE
    if waking.wake_mode(using=using) != mode:
        waking.set_wake_mode(mode, using=using)
