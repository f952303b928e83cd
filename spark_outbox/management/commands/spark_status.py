"""Show how the outbox is; see spark_outbox/operating/look.py."""

import datetime as dt
import json
import time
from typing import Any

from django.core.management.base import CommandParser
from django.utils import timezone

from spark_outbox.management import arguments
from spark_outbox.management.command import OutboxCommand
from spark_outbox.management.output import as_age, as_time, print_table
from spark_outbox.operating import look
from spark_outbox.store.viewing import Row

HELD = {"waits_for_circuit": "circuit", "paused": "paused"}
"""Columns that are shown if there is something in them."""

COUNTS = ("ready", "delayed", "retrying", "running", "failed", "unhandled")

CLEAR = "\x1b[2J\x1b[H"


class Command(OutboxCommand):
    help = (
        "Shows the state of the outbox by group, the workers, and what is not well. It reads no more "
        "than 10,000 events of a kind: a count of 10,000 means that or more."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--watch",
            type=arguments.seconds,
            nargs="?",
            const=2.0,
            metavar="SECONDS",
            help="show it again every so many seconds (2), until Ctrl-C",
        )
        parser.add_argument(
            "--failures",
            action="store_true",
            help="show what fails: by handler and kind of error",
        )
        parser.add_argument(
            "--close-circuit",
            metavar="NAME",
            help="have events handled now that wait since this handler has failed on everything",
        )
        arguments.add_common_arguments(parser, asks=False)

    def handle(self, **options: Any) -> None:
        using = options["database"]
        self.check_database(using)
        if options["close_circuit"]:
            count = look.close_circuit(options["close_circuit"], using=using)
            said = f"{count:,} events of {options['close_circuit']} are ready."
            self.stdout.write(json.dumps({"ready": count}) if options["json"] else said)
            return
        try:
            while True:
                found = look.status(failures=options["failures"], using=using)
                if options["watch"] is not None and self.stdout.isatty():
                    self.stdout.write(CLEAR, ending="")
                if options["json"]:
                    self.stdout.write(json.dumps(found, indent=None if options["watch"] else 2))
                else:
                    self._show(found)
                if options["watch"] is None:
                    return
                self.stdout.flush()
                time.sleep(options["watch"])
        except KeyboardInterrupt:
            self.stdout.write("")

    def _show(self, found: dict[str, list[Row]]) -> None:
        now = timezone.localtime(dt.datetime.now(dt.UTC))  # also without USE_TZ
        self.stdout.write(now.isoformat(sep=" ", timespec="seconds"))
        groups = found["groups"]
        held = [name for name in HELD if any(group[name] for group in groups)]
        header = ["group", "late", *COUNTS, "done/h", *(HELD[name] for name in held), "oldest"]
        print_table(
            self.stdout,
            header,
            [
                [
                    group["group"],
                    as_age(group["late"]),
                    *(f"{group[name]:,}" for name in COUNTS),
                    f"{group['done_last_hour']:,}",
                    *(f"{group[name]:,}" for name in held),
                    as_age(group["oldest_pending_age"]),
                ]
                for group in groups
            ],
        )
        if groups and groups[0]["more"]:
            self.stdout.write("There are more pending events than were counted, maybe of other groups.")
        self.stdout.write("")
        print_table(
            self.stdout,
            ("worker", "state", "for", "since", "groups", "in hand", "version"),
            [
                (
                    f"{worker['host']}:{worker['pid']}",
                    worker["state"],
                    as_age(worker["state_for"]),
                    as_time(worker["started_at"]),
                    worker["groups"] or "",
                    _in_hand(worker),
                    worker["version"],
                )
                for worker in found["workers"]
            ],
        )
        for failure in found.get("failures", ()):
            self.stdout.write("")
            count = f"{failure['failed']:,} failed, {failure['retrying']:,} to be tried again"
            self.stdout.write(f"{failure['handler']}: {count}; last {as_time(failure['last_at'])}")
            self.stdout.write(f"    {failure['fingerprint']}")
            self.stdout.write(f"    for example {failure['example_key']}")
        for check in found["health"]:
            if check["status"] != "ok":
                style = self.style.ERROR if check["status"] == "critical" else self.style.WARNING
                self.stdout.write("")
                self.stdout.write(style(f"{check['status']}: {check['detail']}"))
                self.stdout.write(f"    {check['remedy']}")


def _in_hand(worker: Row) -> str:
    """Return what a handler has had in hand for a while."""
    if not worker["handler"]:
        return ""
    return f"{worker['handler']} ({worker['event_key']}), {as_age(worker['in_hand_seconds'])}"
