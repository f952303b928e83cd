"""The daemon's command line, signals and messages. What it does is in spark_outbox/worker.py."""

import argparse
import logging
import os
import signal
import threading
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, connections
from django.utils import autoreload

import spark_outbox
from spark_outbox import conf
from spark_outbox.errors import SparkOutboxError
from spark_outbox.management import systemd
from spark_outbox.management.alarm import Alarm
from spark_outbox.registry import registry
from spark_outbox.worker import Worker


class Command(BaseCommand):
    help = (
        "Hands events to their handlers, as they are emitted, until it is stopped. SIGTERM or Ctrl-C: "
        "finish the handler in hand, commit, exit; a second one: stop at once, and lose nothing. "
        "Start as many as you like, on as many machines."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        settings = conf.current()
        how_long = parser.add_mutually_exclusive_group()
        how_long.add_argument("--drain", action="store_true", help="exit 0 as soon as no event is ready")
        how_long.add_argument("--once", action="store_true", help="handle one batch and exit 0")
        parser.add_argument(
            "--groups",
            metavar="REGEX",
            help="handle only events whose group matches (a PostgreSQL regular expression)",
        )
        parser.add_argument(
            "--batch-size",
            type=_whole_number,
            default=settings.BATCH_SIZE,
            metavar="N",
            help="lock at most N events at once (default: %(default)s)",
        )
        parser.add_argument(
            "--commit-interval",
            type=_seconds,
            default=settings.COMMIT_INTERVAL,
            metavar="SECONDS",
            help="commit what is handled after this long (default: %(default)s); what a crash can "
            "repeat of mails and the like is at most this much work",
        )
        parser.add_argument(
            "--poll-interval",
            type=_seconds,
            default=settings.POLL_INTERVAL,
            metavar="SECONDS",
            help="look for events this often even if no notification comes (default: %(default)s)",
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
        if options["database"] not in connections:
            raise CommandError(
                f"DATABASES has no {options['database']!r}; it has {', '.join(connections)}."
            )
        self._set_up_logging(options["verbosity"])
        finite = options["drain"] or options["once"]
        reload = conf.debug() and not finite if options["reload"] is None else options["reload"]
        if reload:
            autoreload.run_with_reloader(self._work, **options)
        else:
            self._work(**options)

    def _work(self, **options: Any) -> None:
        in_main_thread = threading.current_thread() is threading.main_thread()  # else reloading
        worker = Worker(
            alarm=Alarm() if in_main_thread else None,
            using=options["database"],
            groups=options["groups"],
            batch_size=options["batch_size"],
            commit_interval=options["commit_interval"],
            poll_interval=options["poll_interval"],
            on_ready=lambda version: self._ready(version, options["database"]),
        )
        if in_main_thread:
            _stop_on_signals(worker)
        try:
            worker.run(drain=options["drain"], once=options["once"])
        except SparkOutboxError as error:
            raise CommandError(str(error)) from None
        systemd.notify("STOPPING=1")

    def _ready(self, version: str, alias: str) -> None:
        name = connections[alias].settings_dict["NAME"]
        handlers = ", ".join(f"{h.name} for {h.pattern.pattern}" for h in registry.handlers)
        self.stdout.write(
            f"spark_outbox {spark_outbox.__version__} on database {name} (PostgreSQL {version}), "
            f"process {os.getpid()}. Handlers: "
            + (handlers or self.style.WARNING("none, so every event will be unhandled"))
        )
        self.stdout.flush()
        systemd.notify("READY=1")

    def _set_up_logging(self, verbosity: int) -> None:
        """With -v 2 or more, show our own log, unless the project's LOGGING does so already."""
        logger = logging.getLogger("spark_outbox")
        if verbosity > 1 and not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO if verbosity == 2 else logging.DEBUG)


def _stop_on_signals(worker: Worker) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)

    def stop(*_: object) -> None:
        # Whatever the second signal cuts off, its transaction was not committed: nothing is lost.
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        systemd.notify("STOPPING=1")
        worker.stop()

    for number in numbers:
        signal.signal(number, stop)


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 10**8:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds
