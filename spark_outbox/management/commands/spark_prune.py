"""Prune events by hand; see spark_outbox/operating/prune.py."""

import json
import time
from collections.abc import Iterator
from typing import Any

from django.core.management.base import CommandError, CommandParser

from spark_outbox.conf import FINAL_STATES
from spark_outbox.management import arguments
from spark_outbox.management.command import OutboxCommand
from spark_outbox.management.output import as_duration, bounded, table
from spark_outbox.operating import prune
from spark_outbox.operating.prune import COUNTED, Choice
from spark_outbox.store.pruning import Pruned
from spark_outbox.worker.retention import Portion

HOLDER_PAUSE = 1.0
"""Seconds between two looks whether a snapshot is still held."""

WAITING = (
    "Waiting: {holder.who} holds a snapshot. What is pruned meanwhile could not be removed by vacuum, "
    "and the table would grow."
)

KEYS_WARNING = (
    "Keys that are forgotten are new again: an event that a source, or your code, emits with one of "
    "them is handled once more."
)


class Command(OutboxCommand):
    help = (
        "Prunes events that have ended, as workers do by themselves after the times that "
        'SPARK_OUTBOX["RETENTION"] says. A pruned event keeps its key, so that it stays a duplicate; '
        "one whose key was made up by emit() is deleted. It works in small transactions, and passes "
        "over rows that somebody holds. Ctrl-C stops it at once; run it again to go on."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--older-than",
            type=arguments.duration,
            metavar="TIME",
            help="instead of what RETENTION says: 30d, 12h, 90m since the event ended. What RETENTION "
            "keeps for ever is pruned only if its state or group is named",
        )
        parser.add_argument(
            "--group",
            type=arguments.regex,
            default="",
            metavar="REGEX",
            help="only events in whose group this is found",
        )
        parser.add_argument(
            "--state",
            action="append",
            default=[],
            choices=FINAL_STATES,
            metavar="STATE",
            help=f"only events of this state; may be repeated: {', '.join(FINAL_STATES)}",
        )
        parser.add_argument(
            "--forget-keys-older-than",
            type=arguments.duration,
            metavar="TIME",
            help="then delete the keys of pruned events that were emitted so long ago. " + KEYS_WARNING,
        )
        parser.add_argument("--dry-run", action="store_true", help="prune nothing, only count")
        arguments.add_common_arguments(parser)

    def handle(self, **options: Any) -> None:
        self._using = using = options["database"]
        self.check_database(using)
        choice = Choice(
            states=tuple(options["state"]), group=options["group"], older_than=options["older_than"]
        )
        portions = choice.portions(using=using)
        counts = [prune.count(portion, using=using) for portion in portions]
        keys_seconds = options["forget_keys_older_than"]
        keys = None if keys_seconds is None else prune.count_keys(keys_seconds, using=using)
        if not options["json"]:
            self._show(portions, counts, keys)
        report = {
            "portions": [
                {**portion._asdict(), "events": min(count, COUNTED), "more": count > COUNTED}
                for portion, count in zip(portions, counts, strict=True)
            ],
            "keys": keys,
            "dry_run": options["dry_run"],
        }
        if not options["dry_run"] and (portions or keys_seconds is not None):
            self.confirm("Prune them?", yes=options["yes"])
            done = self._prune(portions, keys_seconds, sum(counts) + (keys or 0))
            report |= done._asdict()
            if not options["json"]:
                self.stdout.write(
                    f"{done.total:,} events are pruned: {done.stripped:,} keep their keys, "
                    f"{done.deleted:,} are deleted."
                )
        if options["json"]:
            self.stdout.write(json.dumps(report, indent=2))

    def _show(self, portions: list[Portion], counts: list[int], keys: int | None) -> None:
        if portions:
            rows = [
                (state, group, as_duration(seconds), bounded(count, COUNTED))
                for (state, group, seconds), count in zip(portions, counts, strict=True)
            ]
            self.stdout.write(table(("state", "group", "older than", "events"), rows))
        else:
            self.stdout.write("No event is old enough to be pruned.")
        if keys is not None:
            self.stdout.write(f"{bounded(keys, COUNTED)} keys of pruned events are to be forgotten.")
            self.stderr.write(KEYS_WARNING)

    def _prune(self, portions: list[Portion], keys_seconds: float | None, total: int) -> Pruned:
        done = Pruned(0, 0)
        try:
            for each in self._chunks(portions, keys_seconds):
                done = Pruned(done.stripped + each.stripped, done.deleted + each.deleted)
                self.show_progress(f"{done.total:,} of {bounded(total, COUNTED)}")
        except KeyboardInterrupt:
            raise CommandError(
                f"Stopped. {done.total:,} events are pruned; run it again to go on.", returncode=130
            ) from None
        finally:
            self.show_progress("")
        return done

    def _chunks(self, portions: list[Portion], keys_seconds: float | None) -> Iterator[Pruned]:
        """Yield what each chunk did; wait, and say for whom, while somebody holds a snapshot."""
        waits_for = ""
        parts = [prune.prune(portions, using=self._using)]
        if keys_seconds is not None:
            parts.append(prune.forget_keys(keys_seconds, using=self._using))
        for part in parts:
            for each in part:
                if isinstance(each, Pruned):
                    yield each
                    continue
                if each.who != waits_for:
                    waits_for = each.who
                    self.stderr.write(WAITING.format(holder=each))
                time.sleep(HOLDER_PAUSE)
