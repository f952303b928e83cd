"""The daemon's command line, signals and messages. Its work is in spark_outbox/worker/."""

import argparse
import contextlib
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from django.core.management.base import CommandParser
from django.db import DEFAULT_DB_ALIAS, Error, connections
from django.utils import autoreload

import spark_outbox
from spark_outbox import conf
from spark_outbox.errors import NotMigrated, RegistrationError, SettingsError, describe
from spark_outbox.management.command import OutboxCommand
from spark_outbox.processes import systemd
from spark_outbox.processes.fork import SIGNALS, STOPS
from spark_outbox.processes.guard import Guard
from spark_outbox.processes.slot import Slot
from spark_outbox.processes.supervisor import Supervisor
from spark_outbox.registry.handlers import registry
from spark_outbox.worker import booking, bounds, forks
from spark_outbox.worker.loop import Worker


class Command(OutboxCommand):
    help = (
        "Calls the handlers of events as they are emitted, until it is stopped. SIGTERM, SIGHUP or "
        "Ctrl-C: finish the current calls, commit, exit. A second signal: stop at once; nothing is "
        "lost. Start as many workers as you like, on as many machines."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        settings = self.settings()
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
            help="commit handled events after this long (default: %(default)s); a crash can repeat "
            "mails and other outside effects of at most this much work",
        )
        parser.add_argument(
            "--poll-interval",
            type=_seconds,
            default=settings.POLL_INTERVAL,
            metavar="SECONDS",
            help="look for events this often even if no notification comes (default: %(default)s)",
        )
        parser.add_argument(
            "--processes",
            type=_whole_number,
            default=1,
            metavar="N",
            help="run N worker processes (default: %(default)s)",
        )
        parser.add_argument(
            "--async-concurrency",
            type=_whole_number,
            default=settings.ASYNC_CONCURRENCY,
            metavar="N",
            help="run up to N async calls at the same time in each process (default: %(default)s)",
        )
        parser.add_argument(
            "--shutdown-timeout",
            type=_seconds,
            default=30.0,
            metavar="SECONDS",
            help="when stopped, wait this long for handlers to finish (default: %(default)s)",
        )
        parser.add_argument(
            "--answer-timeout",
            type=_seconds,
            default=300.0,
            metavar="SECONDS",
            help="restart a process whose own query has had no reply from the database for this "
            "long; queries of handlers don't count (default: %(default)s)",
        )
        parser.add_argument(
            "--max-events",
            type=_whole_number,
            metavar="N",
            help="restart a process after about N events",
        )
        parser.add_argument(
            "--max-rss",
            type=_whole_number,
            metavar="MIB",
            help="restart a process that has used more memory than this",
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
        self._set_up_logging(options["verbosity"])
        finite = options["drain"] or options["once"]
        reload = conf.debug() and not finite if options["reload"] is None else options["reload"]
        if reload:
            autoreload.run_with_reloader(self._work_in_thread, **options)
        elif code := self._supervise(finite, options):
            sys.exit(code)

    def _supervise(self, finite: bool, options: dict[str, Any]) -> int:
        """Run the workers in processes of their own, and look after them."""
        for connection in connections.all(initialized_only=True):  # they can't be shared
            connection.close()
            getattr(connection, "close_pool", bool)()
        gc.collect()
        gc.freeze()  # loaded code stays: no collection must scan it, and copy its pages
        supervisor = Supervisor(
            lambda slot, ready: self._child(slot, ready, options),
            processes=options["processes"],
            shutdown_timeout=options["shutdown_timeout"],
            answer_timeout=options["answer_timeout"],
            finite=finite,
            on_ready=lambda: systemd.notify("READY=1"),
            on_crash=lambda in_hand, error, number: self._book_crash(in_hand, error, number, options),
        )
        ended_by: list[int] = []
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        stops = [each for each in STOPS if not (nohup and each == signal.SIGHUP)]

        def stop(number: int, _: object) -> None:
            for each in stops:  # a closing terminal may send SIGHUP twice
                signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else stop_at_once)
            systemd.notify("STOPPING=1")
            supervisor.stop()
            if number == signal.SIGINT:
                self._print_current_calls(supervisor.in_hand())

        def stop_at_once(number: int, _: object) -> None:
            supervisor.kill()  # uncommitted events are handled again: nothing is lost
            ended_by.append(number)
            for each in stops:  # a third signal does not wait for bookings
                signal.signal(each, signal.SIG_DFL)

        signal.signal(signal.SIGCHLD, lambda *_: None)  # it only wakes the supervisor
        for each in stops:
            signal.signal(each, stop)
        code = supervisor.run()
        if ended_by:
            os.kill(os.getpid(), ended_by[0])
        return code

    def _child(self, slot: Slot, ready: Callable[[], None], options: dict[str, Any]) -> int:
        """Be one of the worker processes; return its exit code."""

        def on_ready(version: str) -> None:
            if slot.number == 0:
                self._introduce(version, options)
            ready()

        try:
            worker = self._worker(options, guard=Guard(slot), on_ready=on_ready)
            for each in (signal.SIGINT, signal.SIGHUP):  # they reach all processes; SIGTERM follows
                signal.signal(each, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: worker.stop())
            signal.set_wakeup_fd(worker.open(), warn_on_full_buffer=False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            forks.watch()
            worker.run(drain=options["drain"], once=options["once"])
        except (SettingsError, NotMigrated, RegistrationError) as error:
            self.stderr.write(self.style.ERROR(str(error)))
            return os.EX_CONFIG
        except Error as error:  # with --drain or --once; otherwise it reconnects
            message = f"Database {options['database']!r} can't be used: {describe(error)}"
            self.stderr.write(self.style.ERROR(message))
            return 1
        except Exception as error:  # noqa: BLE001, printed; the supervisor restarts the process
            lines = traceback.format_tb(error.__traceback__)  # of code, without values
            self.stderr.write("".join([*lines, f"The worker process dies of {describe(error)}."]))
            return 1
        return 0

    def _work_in_thread(self, **options: Any) -> None:
        """Run the worker under the autoreloader, which occupies the main thread."""

        def on_ready(version: str) -> None:
            self._introduce(version, options)
            systemd.notify("READY=1")

        worker = self._worker(options, on_ready=on_ready)
        worker.run(drain=options["drain"], once=options["once"])

    def _worker(self, options: dict[str, Any], **more: Any) -> Worker:
        return Worker(
            using=options["database"],
            groups=options["groups"],
            batch_size=options["batch_size"],
            commit_interval=options["commit_interval"],
            poll_interval=options["poll_interval"],
            async_concurrency=options["async_concurrency"],
            max_events=options["max_events"],
            max_rss=options["max_rss"],
            **more,
        )

    def _book_crash(
        self,
        in_hand: list[tuple[int, int]],
        error: BaseException | None,
        number: int,
        options: dict[str, Any],
    ) -> None:
        """Book a crash, or log that the database refuses. Without an error, only put the events back.

        Runs in a process of its own: see the supervisor.
        """
        using = options["database"]
        bounds.set_bounds(using)
        bounds.leave_pools(using)
        try:
            booking.book(in_hand, error, registry, session=number, using=using)
        except Error as refusal:
            event_id, _ = in_hand[0]
            self.stderr.write(f"A crash on event {event_id} could not be counted: {describe(refusal)}")

    def _print_current_calls(self, in_hand: list[tuple[int, int]]) -> None:
        """Print, after a Ctrl-C, why the worker has not ended yet."""
        events: dict[str, list[int]] = {}
        for event_id, number in in_hand:
            events.setdefault(registry.handlers[number].name, []).append(event_id)
        calls = ", ".join(
            f"{name} on event {ids[0]}" + (f" and {len(ids) - 1} more" if ids[1:] else "")
            for name, ids in events.items()
        )
        if calls:
            # The signal may have interrupted a write to this stream.
            with contextlib.suppress(OSError, RuntimeError):
                self.stderr.write(
                    f"Waiting for {calls}; press Ctrl-C again to stop at once (nothing is lost)."
                )

    def _introduce(self, version: str, options: dict[str, Any]) -> None:
        name = connections[options["database"]].settings_dict["NAME"]
        handlers = ", ".join(f"{h.name} for {h.pattern.pattern}" for h in registry.handlers)
        count = options["processes"]
        self.stdout.write(
            f"spark_outbox {spark_outbox.__version__} on database {name} (PostgreSQL {version}), "
            f"{count} process{'es' if count > 1 else ''}. Handlers: "
            + (handlers or self.style.WARNING("none, so every event will be unhandled"))
        )
        self.stdout.flush()

    def _set_up_logging(self, verbosity: int) -> None:
        """With -v 2 or more, show our own log, unless the project's LOGGING does so already."""
        logger = logging.getLogger("spark_outbox")
        if verbosity > 1 and not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO if verbosity == 2 else logging.DEBUG)


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
