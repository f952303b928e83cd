"""Pause a handler or a group; see spark_outbox/operating/pauses.py."""

from typing import Any

from django.core.management.base import CommandError, CommandParser

from spark_outbox.management import arguments
from spark_outbox.management.pauses import PauseCommand
from spark_outbox.operating import pauses


class Command(PauseCommand):
    help = (
        "Pauses a handler, or all handlers of a group; without either, lists what is paused. A worker "
        "heeds it at the latest from its first batch that begins 0.8 s later; a batch in progress goes "
        "on, and calls under way end as usual. Emits go on: the events wait until spark_resume, and use "
        "up no attempt. Other handlers of these events are called, unless their group is paused. An "
        "event that waits holds up those that come after it in their order."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        self.add_choice(parser, required=False)
        parser.add_argument("--why", metavar="TEXT", help="the reason, for those who ask")
        arguments.add_common_arguments(parser, asks=False)

    def handle(self, **options: Any) -> None:
        using = options["database"]
        self.check_database(using)
        chosen = self.chosen(options)
        if chosen is None:
            if options["why"] is not None:
                raise CommandError("Give --handler or --group.")
            self.list_pauses(options)
            return
        kind, name = chosen
        if kind == "handler" and not pauses.is_handler(name):
            near = "\n  ".join(pauses.similar_handlers(name)) or "none"
            raise CommandError(
                f"This project has no handler {name!r}. The most similar ones:\n  {near}\n"
                "To pause one that only another release has: select spark_pause('handler', …)."
            )
        changed = pauses.pause(kind, name, options["why"] or "", using=using)
        self.report(changed, f"The {kind} {name} is paused.", options)
