"""What spark_pause and spark_resume have in common."""

import json
from typing import Any

from django.core.management.base import CommandError, CommandParser

from spark_outbox.management.command import OutboxCommand
from spark_outbox.management.output import as_time, print_table
from spark_outbox.operating import pauses
from spark_outbox.store.pausing import Changed

COLUMNS = ("kind", "name", "since", "by", "waiting", "why")


class PauseCommand(OutboxCommand):
    """A command that changes one pause, or lists them."""

    def add_choice(self, parser: CommandParser, *, required: bool) -> None:
        choice = parser.add_mutually_exclusive_group(required=required)
        choice.add_argument("--handler", metavar="NAME", help="this handler, by its name")
        choice.add_argument("--group", metavar="NAME", help="this group, by all of its name: no pattern")

    def chosen(self, options: dict[str, Any]) -> tuple[str, str] | None:
        """Return the kind and the name that are given; None if none is."""
        for kind in ("handler", "group"):
            if options[kind] is not None:
                return kind, options[kind]
        return None

    def report(self, changed: Changed, said: str, options: dict[str, Any]) -> None:
        """Say what was changed. Raises CommandError if nothing was."""
        found, notices = changed
        if not found:
            raise CommandError(" ".join([*notices, "Nothing was changed."]))
        for notice in notices:
            self.stderr.write(notice)
        self.stdout.write(json.dumps(found[0], indent=2) if options["json"] else said)

    def list_pauses(self, options: dict[str, Any]) -> None:
        found = pauses.pauses(using=options["database"])
        if options["json"]:
            self.stdout.write(json.dumps(found, indent=2))
        elif found:
            rows = [
                (
                    *(pause[name] for name in ("kind", "name")),
                    as_time(pause["paused_at"]),
                    pause["paused_by"],
                    f"{pause['waiting']:,}",
                    pause["why"],
                )
                for pause in found
            ]
            print_table(self.stdout, COLUMNS, rows)
        else:
            self.stderr.write("Nothing is paused.")
