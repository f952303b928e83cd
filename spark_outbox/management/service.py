"""The daemon that `spark_worker` starts: its processes, its signals, and its messages to people."""

import contextlib
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from django.core.management.base import OutputWrapper
from django.core.management.color import Style
from django.db import Error, OperationalError, connections

import spark_outbox
from spark_outbox.errors import NotMigrated, RegistrationError, SettingsError, describe
from spark_outbox.management.journal import is_journal
from spark_outbox.management.metrics import Metrics
from spark_outbox.processes import systemd
from spark_outbox.processes.fork import SIGNALS, name_process
from spark_outbox.processes.guard import Guard
from spark_outbox.processes.probes import Probes
from spark_outbox.processes.reload import Reload
from spark_outbox.processes.serving import Server
from spark_outbox.processes.signs import Signs
from spark_outbox.processes.slot import Slot
from spark_outbox.processes.supervisor import Supervisor
from spark_outbox.processes.watch import Watch
from spark_outbox.registry.handlers import registry
from spark_outbox.worker import booking, bounds, forks, ported
from spark_outbox.worker.context import make_context
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.session import check_handlers, check_outbox

logger = logging.getLogger(__name__)


class Service:
    """The worker processes of one command. `options` are those of its command line."""

    def __init__(
        self, options: dict[str, Any], stdout: OutputWrapper, stderr: OutputWrapper, style: Style
    ) -> None:
        self._options = options
        self._stdout = stdout
        self._stderr = stderr
        self._style = style
        self._metrics: Metrics | None = None
        self._has_started = False

    def check(self) -> None:
        """Say what the worker would handle.

        Raises SettingsError if it can't work, NotMigrated if the database answers and has no outbox.
        """
        using, groups = self._options["database"], self._options["groups"]
        check_handlers(make_context(using=using))
        try:
            check_outbox(groups, using=using)
            if not self._options["ignore_django_spark"]:
                ported.check_keys(using=using)
        except OperationalError as error:
            self._complain(f"Database {using!r} is not looked at: {describe(error)}")
        self._stdout.write(f"spark_outbox {spark_outbox.__version__}. {self._handlers()}")

    def supervise(self, *, finite: bool) -> int:
        """Run the workers in processes of their own, and look after them."""
        for connection in connections.all(initialized_only=True):  # they can't be shared
            connection.close()
            getattr(connection, "close_pool", bool)()
        gc.collect()
        gc.freeze()  # loaded code stays: no collection must scan it, and copy its pages
        name_process("spark_worker")
        timeout = self._options["shutdown_timeout"]
        reload = Reload([sys.executable, *sys.orig_argv[1:], "--check"])
        supervisor = Supervisor(
            self._child,
            processes=self._options["processes"],
            shutdown_timeout=timeout,
            answer_timeout=self._options["answer_timeout"],
            finite=finite,
            on_ready=self._announce,
            on_crash=self._book_crash,
            signs=Signs(
                name_of=lambda number: registry.handlers[number].name,
                probes=Probes(
                    liveness_file=self._options["liveness_file"], address=self._options["health_port"]
                ),
                metrics=self._serve_metrics(),
            ),
            reload=reload,
        )
        ended_by: list[int] = []
        stops = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has not said otherwise
            if any(map(os.isatty, range(3))):
                stops.append(signal.SIGHUP)  # the terminal goes away
            else:
                signal.signal(signal.SIGHUP, lambda *_: reload.ask())

        def stop(number: int, _: object) -> None:
            for each in stops:  # a closing terminal may send SIGHUP twice
                signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else stop_at_once)
            systemd.stopping(timeout)
            supervisor.stop()
            if number == signal.SIGINT and (calls := supervisor.calls()):
                self._print_current_calls(calls)

        def stop_at_once(number: int, _: object) -> None:
            supervisor.kill()  # uncommitted events are handled again: nothing is lost
            ended_by.append(number)
            for each in stops:  # a third signal does not wait for bookings
                signal.signal(each, signal.SIG_DFL)

        signal.signal(signal.SIGCHLD, lambda *_: None)  # it only wakes the supervisor
        for each in stops:
            signal.signal(each, stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the program before has blocked them
        try:
            code = supervisor.run()
        finally:
            if self._metrics is not None:
                self._metrics.remove()
        if ended_by:
            os.kill(os.getpid(), ended_by[0])
        return code

    def _announce(self) -> None:
        self._has_started = True
        systemd.notify("READY=1")

    def _serve_metrics(self) -> Server | None:
        if self._options["metrics_port"] is None:
            return None
        self._metrics = Metrics(self._options["metrics_port"], using=self._options["database"])
        return self._metrics.server

    def _child(self, slot: Slot, watch: Watch, ready: Callable[[], None]) -> int:
        """Be one of the worker processes; return its exit code."""

        def on_ready(version: str) -> None:
            if slot.number == 0:
                self._introduce(version)
            ready()

        try:
            if self._metrics is not None:
                self._metrics.count(slot.number)
            worker = self._worker(guard=Guard(slot), watch=watch, on_ready=on_ready)
            for each in (signal.SIGINT, signal.SIGHUP):  # they reach all processes; SIGTERM follows
                signal.signal(each, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: worker.stop())
            signal.set_wakeup_fd(worker.open(), warn_on_full_buffer=False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            forks.watch()
            worker.run(drain=self._options["drain"], once=self._options["once"])
        except (SettingsError, NotMigrated, RegistrationError) as error:
            self._complain(str(error))
            return os.EX_CONFIG
        except Error as error:  # with --drain or --once; otherwise it reconnects
            self._complain(f"Database {self._options['database']!r} can't be used: {describe(error)}")
            return 1
        except Exception as error:  # noqa: BLE001, printed; the supervisor restarts the process
            lines = traceback.format_tb(error.__traceback__)  # of code, without values
            self._complain("".join([*lines, f"The worker process dies of {describe(error)}."]))
            return 1
        return 0

    def run_in_thread(self) -> None:
        """Run the worker under the autoreloader, which occupies the main thread."""

        def on_ready(version: str) -> None:
            self._introduce(version)
            systemd.notify("READY=1")

        worker = self._worker(on_ready=on_ready)
        worker.run(drain=self._options["drain"], once=self._options["once"])

    def _worker(self, **more: Any) -> Worker:
        return Worker(
            using=self._options["database"],
            groups=self._options["groups"],
            batch_size=self._options["batch_size"],
            commit_interval=self._options["commit_interval"],
            poll_interval=self._options["poll_interval"],
            async_concurrency=self._options["async_concurrency"],
            max_events=self._options["max_events"],
            max_rss=self._options["max_rss"],
            # A process that is restarted goes on, whatever django-spark has handled meanwhile.
            needs_keys=not (self._has_started or self._options["ignore_django_spark"]),
            **more,
        )

    def _book_crash(
        self,
        in_hand: list[tuple[int, int]],
        error: BaseException | None,
        number: int,
    ) -> None:
        """Book a crash, or log that the database refuses. Without an error, only put the events back.

        Runs in a process of its own: see the supervisor.
        """
        using = self._options["database"]
        bounds.set_bounds(using)
        bounds.leave_pools(using)
        try:
            booking.book(in_hand, error, registry, session=number, using=using)
        except Error as refusal:
            event_id, _ = in_hand[0]
            self._complain(f"A crash on event {event_id} could not be counted: {describe(refusal)}")

    def _complain(self, text: str) -> None:
        """Say why it does not work: to people, or as an error to the journal."""
        if is_journal():
            logger.error(text)
        else:
            self._stderr.write(self._style.ERROR(text))

    def _print_current_calls(self, calls: str) -> None:
        """Print, after a Ctrl-C, why the worker has not ended yet."""
        # The signal may have interrupted a write to this stream.
        with contextlib.suppress(OSError, RuntimeError):
            self._stderr.write(
                f"Waiting for {calls}; press Ctrl-C again to stop at once (nothing is lost)."
            )

    def _introduce(self, version: str) -> None:
        name = connections[self._options["database"]].settings_dict["NAME"]
        count = self._options["processes"]
        self._stdout.write(
            f"spark_outbox {spark_outbox.__version__} on database {name} (PostgreSQL {version}), "
            f"{count} process{'es' if count > 1 else ''}. {self._handlers()}"
        )
        self._stdout.flush()

    def _handlers(self) -> str:
        handlers = ", ".join(f"{h.name} for {h.pattern.pattern}" for h in registry.handlers)
        return "Handlers: " + (handlers or self._style.WARNING("none, so every event will be unhandled"))
