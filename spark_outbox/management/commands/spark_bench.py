"""The benchmark's command line and its table. The measurements are in spark_outbox/bench/."""

import json
import signal
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS
from django.test import override_settings

from spark_outbox import conf
from spark_outbox.bench import (
    draining,
    emitting,
    enduring,
    notifying,
    pruning,
    resting,
    sharing,
    waking,
)
from spark_outbox.bench.figures import MEASURES, Bench, Figure
from spark_outbox.bench.scratch import scratch
from spark_outbox.errors import SparkOutboxError
from spark_outbox.management.command import OutboxCommand

ALL = (
    draining,
    emitting,
    waking,
    resting,
    enduring,
    notifying,
    pruning,
    sharing,
)  # importing them has filled MEASURES

HEADER = ("name", "value", "unit", "baseline", "ratio", "goal", "met")


class Command(OutboxCommand):
    help = (
        "Measures how fast the outbox is on this machine and this PostgreSQL, against a baseline of the "
        "same run: bare psycopg or the ORM, doing only the necessary work. It works in databases of its "
        "own, and drops them at the end; your events are not touched. A full run takes about an hour, "
        "--quick about five minutes. Run nothing else meanwhile."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--only",
            action="append",
            choices=list(MEASURES),
            metavar="NAME",
            help=f"measure only this; may be repeated: {', '.join(MEASURES)}",
        )
        parser.add_argument(
            "--quick",
            action="store_true",
            help="fewer events and two rounds instead of five: a rough idea, not figures to quote",
        )
        parser.add_argument(
            "--json", action="store_true", help=f"print a list of objects with {', '.join(HEADER)}"
        )
        parser.add_argument(
            "--database",
            default=DEFAULT_DB_ALIAS,
            metavar="ALIAS",
            help="measure on this server; its user needs the right to create databases "
            "(default: %(default)s)",
        )

    def handle(self, **options: Any) -> None:
        near = options["database"]
        self.check_database(near)
        settings = conf.current()
        kept = {"COMMIT_INTERVAL": settings.COMMIT_INTERVAL, "BATCH_SIZE": settings.BATCH_SIZE}
        signal.signal(signal.SIGTERM, stop)
        found: list[Figure] = []
        try:
            with override_settings(SPARK_OUTBOX=kept), scratch(near) as database:
                for name in dict.fromkeys(options["only"] or MEASURES):
                    bench = Bench(
                        database,
                        near,
                        quick=options["quick"],
                        say=lambda text, name=name: self.show_progress(f"{name}: {text}"),  # type: ignore[misc]
                    )
                    figures = MEASURES[name](bench)
                    found += figures
                    self.show_progress("")
                    if not options["json"]:
                        self._print(figures, first=found == figures)
        except SparkOutboxError as error:
            raise CommandError(str(error)) from error
        except KeyboardInterrupt:
            self.show_progress("")
            raise CommandError("Interrupted; the scratch databases have been dropped.") from None
        if options["json"]:
            self.stdout.write(json.dumps([figure.as_dict() for figure in found], indent=2))
        elif options["quick"]:
            self.stdout.write("With --quick the figures are rough: don't compare them.")

    def _print(self, figures: list[Figure], *, first: bool) -> None:
        if first:
            self.stdout.write(line(*HEADER))
        for figure in figures:
            self.stdout.write(
                line(
                    figure.name,
                    number(figure.value),
                    figure.unit,
                    number(figure.baseline),
                    number(figure.ratio),
                    figure.goal or "",
                    {True: "yes", False: "NO", None: ""}[figure.met],
                )
            )
        self.stdout.flush()


def stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def line(*cells: object) -> str:
    widths = (22, 10, 15, 10, 7, 9, 4)
    texts = [f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True)]
    return f"{cells[0]!s:<{widths[0]}} " + " ".join(texts[1:])


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
