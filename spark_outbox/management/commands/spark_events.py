"""List events, or show one whole; see spark_outbox/operating/look.py."""

import json
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db import DataError

from spark_outbox.management import arguments
from spark_outbox.management.command import OutboxCommand
from spark_outbox.management.output import as_time, print_table
from spark_outbox.operating import look
from spark_outbox.store.viewing import LOOKED_AT, Filter, Row

STATES = ("pending", "running", "done", "failed", "unhandled", "discarded")


class Command(OutboxCommand):
    help = (
        "Lists the latest events, or shows one whole: with its payload, what its handlers have done, "
        "the traceback, and why it is where it is. A list looks at no more than "
        f"{LOOKED_AT:,} events of a state. SPARK_OUTBOX['REDACT'] says what is not shown."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("key", nargs="?", metavar="KEY", help="show this event whole")
        parser.add_argument("--state", choices=STATES, metavar="STATE", help=", ".join(STATES))
        parser.add_argument(
            "--group", default="", metavar="REGEX", help="only events whose group matches (PostgreSQL's)"
        )
        parser.add_argument(
            "--handler", default="", metavar="NAME", help="only events on which this handler fails"
        )
        parser.add_argument(
            "--fingerprint", default="", metavar="TEXT", help="only events with this kind of error"
        )
        parser.add_argument(
            "--key-prefix", default="", metavar="TEXT", help="only events whose key begins so"
        )
        parser.add_argument(
            "--older-than",
            type=arguments.duration,
            metavar="TIME",
            help="only events that were emitted so long ago: 30d, 12h, 90m",
        )
        parser.add_argument(
            "--limit",
            type=arguments.whole_number,
            default=50,
            metavar="N",
            help="so many events (default: %(default)s)",
        )
        arguments.add_common_arguments(parser, asks=False)

    def handle(self, **options: Any) -> None:
        using = options["database"]
        self.check_database(using)
        if options["key"] is not None:
            self._show(options["key"], options)
            return
        wanted = Filter(
            state=options["state"],
            group=options["group"],
            handler=options["handler"],
            fingerprint=options["fingerprint"],
            prefix=options["key_prefix"],
            seconds=options["older_than"],
        )
        try:
            found = look.events(wanted, limit=options["limit"], using=using)
        except DataError as error:
            raise CommandError(f"--group {options['group']!r}: {error}".strip()) from None
        if options["json"]:
            self.stdout.write(json.dumps(found, indent=2))
        elif found:
            header = ("id", "key", "group", "status", "attempts", "emitted", "error")
            rows = [
                [
                    *(event[name] for name in header[:5]),
                    as_time(event["created_at"]),
                    event["error"][:60],
                ]
                for event in found
            ]
            print_table(self.stdout, header, rows)
        else:
            self.stderr.write("No such event.")

    def _show(self, key: str, options: dict[str, Any]) -> None:
        event = look.event(key, using=options["database"])
        if event is None:
            (why,) = look.explanation(key, using=options["database"])
            raise CommandError(why)
        if options["json"]:
            self.stdout.write(json.dumps(event, indent=2))
            return
        for name in ("key", "group", "id", "status", "attempts", "ordering_key"):
            if event[name] is not None:
                self.stdout.write(f"{name:<14}{event[name]}")
        for name in ("created_at", "available_at", "finished_at"):
            if event[name] is not None:
                self.stdout.write(f"{name:<14}{as_time(event[name])}")
        for sentence in event["explanation"]:
            self.stdout.write(self.style.NOTICE(sentence))
        for name in ("payload", "headers"):
            if event[name]:
                self.stdout.write(f"\n{name}\n{json.dumps(event[name], indent=2, ensure_ascii=False)}")
        for delivery in event["deliveries"]:
            self._show_delivery(delivery)

    def _show_delivery(self, delivery: Row) -> None:
        took = "" if delivery["duration"] is None else f", {delivery['duration'] * 1000:,.0f} ms"
        self.stdout.write(
            f"\n{delivery['handler']}: {delivery['status']}, {delivery['attempts']} attempts, the last "
            f"at {as_time(delivery['attempted_at'])}{took}, worker {delivery['worker'] or 'unknown'}"
        )
        if delivery["traceback"] or delivery["error"]:
            self.stdout.write(delivery["traceback"] or delivery["error"])
