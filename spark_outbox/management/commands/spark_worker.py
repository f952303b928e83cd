"""The command line of the daemon. Its processes are in management/service.py."""

import argparse
import sys
from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser
from django.db import DEFAULT_DB_ALIAS
from django.utils import autoreload

from spark_outbox import conf
from spark_outbox.management.arguments import address, seconds, whole_number
from spark_outbox.management.command import OutboxCommand
from spark_outbox.management.journal import set_up_logging
from spark_outbox.management.service import Service


class Command(OutboxCommand):
    help = (
        "Calls the handlers of events as they are emitted, until it is stopped. SIGTERM or Ctrl-C: "
        "finish the current calls, commit, exit. A second signal: stop at once; nothing is lost. "
        "SIGHUP: load new code, and restart one process after the other; on a terminal, stop. Start as "
        "many workers as you like, on as many machines."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        settings = self.settings()
        how_long = parser.add_mutually_exclusive_group()
        how_long.add_argument("--drain", action="store_true", help="exit 0 as soon as no event is ready")
        how_long.add_argument("--once", action="store_true", help="handle one batch and exit 0")
        parser.add_argument(
            "--check", action="store_true", help="load settings and handlers, say which, and exit 0"
        )
        parser.add_argument(
            "--groups",
            metavar="REGEX",
            help="handle only events whose group matches (a PostgreSQL regular expression)",
        )
        parser.add_argument(
            "--batch-size",
            type=whole_number,
            default=settings.BATCH_SIZE,
            metavar="N",
            help="lock at most N events at once (default: %(default)s)",
        )
        parser.add_argument(
            "--commit-interval",
            type=seconds,
            default=settings.COMMIT_INTERVAL,
            metavar="SECONDS",
            help="commit handled events after this long (default: %(default)s); a crash can repeat "
            "mails and other outside effects of at most this much work",
        )
        parser.add_argument(
            "--poll-interval",
            type=seconds,
            default=settings.POLL_INTERVAL,
            metavar="SECONDS",
            help="look for events this often even if no notification comes (default: %(default)s)",
        )
        parser.add_argument(
            "--processes",
            type=whole_number,
            default=1,
            metavar="N",
            help="run N worker processes (default: %(default)s)",
        )
        parser.add_argument(
            "--async-concurrency",
            type=whole_number,
            default=settings.ASYNC_CONCURRENCY,
            metavar="N",
            help="run up to N async calls at the same time in each process (default: %(default)s)",
        )
        parser.add_argument(
            "--shutdown-timeout",
            type=seconds,
            default=30.0,
            metavar="SECONDS",
            help="when stopped, wait this long for handlers to finish (default: %(default)s)",
        )
        parser.add_argument(
            "--answer-timeout",
            type=seconds,
            default=300.0,
            metavar="SECONDS",
            help="restart a process whose own query has had no reply from the database for this "
            "long; queries of handlers don't count (default: %(default)s)",
        )
        parser.add_argument(
            "--liveness-file",
            type=Path,
            metavar="PATH",
            help="renew this file's time each second while all processes are well",
        )
        parser.add_argument(
            "--health-port",
            type=address,
            metavar="[ADDRESS:]PORT",
            help="answer GET /live and /ready over HTTP (on 127.0.0.1 if no address is given)",
        )
        parser.add_argument(
            "--metrics-port",
            type=address,
            metavar="[ADDRESS:]PORT",
            help="answer GET /metrics to Prometheus (on 127.0.0.1 if no address is given)",
        )
        parser.add_argument(
            "--max-events",
            type=whole_number,
            metavar="N",
            help="restart a process after about N events",
        )
        parser.add_argument(
            "--max-rss",
            type=whole_number,
            metavar="MIB",
            help="restart a process that has used more memory than this",
        )
        parser.add_argument(
            "--ignore-django-spark", action="store_true", help="start though its keys are not imported"
        )
        parser.add_argument(
            "--database",
            default=DEFAULT_DB_ALIAS,
            metavar="ALIAS",
            help="the database whose outbox to work on (default: %(default)s)",
        )
        parser.add_argument(
            "--reload",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="restart when the code changes (default: with DEBUG)",
        )

    def handle(self, **options: Any) -> None:
        self.check_database(options["database"])
        conf.current()
        set_up_logging(options["verbosity"])
        finite = options["drain"] or options["once"]
        reload = conf.debug() and not finite if options["reload"] is None else options["reload"]
        service = Service(options, self.stdout, self.stderr, self.style)
        if options["check"]:
            service.check()
        elif reload:
            autoreload.run_with_reloader(service.run_in_thread)
        elif code := service.supervise(finite=finite):
            sys.exit(code)
