"""Replay past events to a handler; see spark_outbox/operating/replay.py."""

import argparse
from datetime import datetime, time
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS
from django.utils import timezone
from django.utils.dateparse import parse_date, parse_datetime

from spark_outbox.management.command import OutboxCommand
from spark_outbox.operating.replay import Selection, rehearse, replay
from spark_outbox.registry.handlers import registry


class Command(OutboxCommand):
    help = (
        "Gives events that are done to a handler once more: to a new handler, for older events, or to a "
        "handler that had a bug. The workers call it; other handlers are not called again. With "
        "--rehearse the handler runs in this process, in a transaction that is rolled back, and the "
        "command prints the result. Effects outside of the database, such as mails, are real even then."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--handler", required=True, metavar="NAME", help="the handler's name")
        parser.add_argument(
            "--group", default="", metavar="REGEX", help="only events whose group matches"
        )
        parser.add_argument(
            "--since",
            type=_moment,
            metavar="TIME",
            help="only events emitted since: 2026-01-31, or 2026-01-31T12:00+01:00",
        )
        parser.add_argument(
            "--key", nargs="+", default=[], metavar="KEY", help="only events with these keys"
        )
        parser.add_argument(
            "--rehearse", action="store_true", help="call the handler now, and roll back; see above"
        )
        parser.add_argument(
            "--limit",
            type=int,
            default=100,
            metavar="N",
            help="rehearse at most N events (default: 100)",
        )
        parser.add_argument("--yes", action="store_true", help="don't ask before events without --key")
        parser.add_argument(
            "--database", default=DEFAULT_DB_ALIAS, metavar="ALIAS", help="default: %(default)s"
        )

    def handle(self, **options: Any) -> None:
        using = options["database"]
        self.check_database(using)
        named = [handler for handler in registry.handlers if handler.name == options["handler"]]
        if not named:
            known = "\n  ".join(handler.name for handler in registry.handlers) or "none"
            raise CommandError(f"There is no handler {options['handler']!r}. Handlers:\n  {known}")
        selection = Selection(
            handler=named[0],
            group=options["group"],
            since=options["since"],
            keys=tuple(options["key"]),
        )
        for key, reason in selection.left_out(using=using).items():
            self.stderr.write(f"{key} is left out: {reason}")
        if options["rehearse"]:
            self._rehearse(selection, using, options["limit"])
        else:
            self._replay(selection, using, yes=options["yes"])

    def _replay(self, selection: Selection, using: str, *, yes: bool) -> None:
        if not (yes or selection.keys) and (count := sum(map(len, selection.ids(using=using)))):
            question = f"Give {count:,} events to {selection.handler.name}?"
            self.confirm(question, yes=False, instead="--rehearse")
        total = 0
        for total in replay(selection, using=using):
            self.show_progress(f"{total:,} events")
        self.show_progress("")
        self.stdout.write(f"{total} events are given to {selection.handler.name}.")
        if not total and not selection.keys:
            self.stderr.write(f"No such event is done in the groups {selection.groups()}.")

    def _rehearse(self, selection: Selection, using: str, limit: int) -> None:
        if limit < 1:
            raise CommandError("--limit must be 1 or more.")
        done = rehearse(selection, using=using, limit=limit)
        for key, text in done.failures:
            self.stdout.write(f"{key}:\n{text}")
        self.stdout.write(f"{done.events} events, {len(done.failures)} failures")
        if done.events:
            self.stdout.write(f"{done.queries / done.events:.1f} queries per event")
        for table, count in done.rows.items():
            self.stdout.write(f"{count} rows written to {table}")
        self.stdout.write("All of it was rolled back.")
        if done.failures:
            raise CommandError(f"The handler failed on {len(done.failures)} events.")


def _moment(text: str) -> datetime:
    try:
        moment = parse_datetime(text)
        if moment is None and (day := parse_date(text)):
            moment = datetime.combine(day, time())
    except ValueError:
        moment = None
    if moment is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no date or time as in 2026-01-31T12:00")
    return moment if timezone.is_aware(moment) else timezone.make_aware(moment)
