"""Have events handled now; see spark_outbox/operating/repair.py."""

from typing import Any

from django.core.management.base import CommandParser

from spark_outbox.management.repair import RepairCommand
from spark_outbox.operating import repair


class Command(RepairCommand):
    help = (
        "Has events handled now that failed for good, were unhandled or discarded, or wait for their "
        "next attempt: those with the keys that are given, or all that failed for good in the same way. "
        "What failed has all its attempts again. A worker that has an event in hand keeps it."
    )
    done = "{count:,} events are to be handled now."

    def add_arguments(self, parser: CommandParser) -> None:
        self.add_choice(parser, "retry")

    def handle(self, **options: Any) -> None:
        using = options["database"]
        self.change(
            options,
            "Retry them?",
            lambda keys: repair.retry(keys, using=using),
            lambda failed, most: repair.retry_failed(failed, most=most, using=using),
        )
