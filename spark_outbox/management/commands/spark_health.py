"""Check the outbox, for probes; see spark_outbox/operating/look.py."""

import json
import sys
from typing import Any

from django.core.management.base import CommandParser
from django.db import Error

from spark_outbox.errors import describe
from spark_outbox.management import arguments
from spark_outbox.management.command import OutboxCommand
from spark_outbox.operating import look


class Command(OutboxCommand):
    help = (
        "Says whether all is well, and what to do if not: a line for each check. The exit code is 0 if "
        "all is well, 1 after a warning, and 2 if something is critical or the database is away."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--max-lag",
            type=arguments.duration,
            metavar="TIME",
            help="the lag is critical if an event that could be handled waits for longer (10m)",
        )
        parser.add_argument(
            "--fail-on",
            choices=("warning", "critical"),
            default="warning",
            help="exit 0 after less than that (default: %(default)s)",
        )
        arguments.add_common_arguments(parser, asks=False)

    def handle(self, **options: Any) -> None:
        using = options["database"]
        self.check_database(using)
        try:
            checks = look.health(max_lag=options["max_lag"], using=using)
        except Error as error:
            checks = [
                {
                    "name": "database",
                    "status": "critical",
                    "detail": f"The outbox can't be asked ({describe(error)}).",
                    "remedy": "Is the database there, is the outbox migrated, and may this role see it?",
                }
            ]
        if options["json"]:
            self.stdout.write(json.dumps(checks, indent=2))
        else:
            for check in checks:
                self.stdout.write(f"{self.mark(check['status'])} {check['name']}: {check['detail']}")
                if check["status"] != "ok":
                    self.stdout.write(f"         {check['remedy']}")
        code = look.worst(checks)
        if code >= look.BY_SEVERITY.index(options["fail_on"]):
            sys.exit(code)

    def mark(self, status: str) -> str:
        style = {"ok": self.style.SUCCESS, "warning": self.style.WARNING, "critical": self.style.ERROR}
        return style[status](f"{status:<8}")
