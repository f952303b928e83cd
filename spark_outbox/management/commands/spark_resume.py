"""End a pause; see spark_outbox/operating/pauses.py."""

from typing import Any

from django.core.management.base import CommandParser

from spark_outbox.management import arguments
from spark_outbox.management.pauses import PauseCommand
from spark_outbox.operating import pauses


class Command(PauseCommand):
    help = (
        "Ends the pause of a handler or a group. The first thousand of the events that have waited are "
        "handled at once; workers take up the others after these. spark_pause lists what is paused."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        self.add_choice(parser, required=True)
        arguments.add_common_arguments(parser, asks=False)

    def handle(self, **options: Any) -> None:
        using = options["database"]
        self.check_database(using)
        kind, name = self.chosen(options) or ("", "")
        changed = pauses.resume(kind, name, using=using)
        self.report(changed, f"The {kind} {name} is not paused any more.", options)
