"""Give events up; see spark_outbox/operating/repair.py."""

from typing import Any

from django.core.management.base import CommandParser

from spark_outbox.management.repair import RepairCommand
from spark_outbox.operating import repair


class Command(RepairCommand):
    help = (
        "Gives events up that are pending, unhandled, or have failed: those with the keys that are "
        "given, or all that failed for good in the same way. No handler is called with them any more, "
        "and what comes after them in their order goes on. spark_retry takes it back."
    )
    done = "{count:,} events are given up."

    def add_arguments(self, parser: CommandParser) -> None:
        self.add_choice(parser, "discard")
        parser.add_argument("--why", required=True, metavar="TEXT", help="the reason, for those who ask")

    def handle(self, **options: Any) -> None:
        using, why = options["database"], options["why"]
        self.change(
            options,
            "Give them up?",
            lambda keys: repair.discard(keys, why, using=using),
            lambda failed, most: repair.discard_failed(failed, why, most=most, using=using),
        )
