"""The base of the commands that repair events: which events they choose, and what they ask and say."""

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.utils import timezone

from spark_outbox.management import arguments
from spark_outbox.management.command import OutboxCommand
from spark_outbox.management.output import bounded
from spark_outbox.operating import repair
from spark_outbox.store.repairing import Changed, Failed


class RepairCommand(OutboxCommand):
    """Changes events with the keys that are given, or those that have failed in the same way."""

    done = ""
    """What is said at the end, with a `count`."""

    def add_choice(self, parser: CommandParser, verb: str) -> None:
        parser.add_argument("keys", nargs="*", metavar="KEY", help=f"{verb} the events with these keys")
        parser.add_argument(
            "--failed", action="store_true", help=f"{verb} all that have failed for good; or some:"
        )
        parser.add_argument("--handler", metavar="NAME", help="only those of this handler")
        parser.add_argument(
            "--fingerprint",
            metavar="TEXT",
            help="only those with this kind of error, as spark_outbox_failures and spark_events show it",
        )
        parser.add_argument(
            "--since",
            type=arguments.duration,
            metavar="TIME",
            help="only those whose last attempt was so long ago at the most: 30d, 12h, 90m",
        )
        parser.add_argument(
            "--max",
            type=arguments.whole_number,
            default=10**9,
            metavar="N",
            help="no more than N, the oldest first (default: all)",
        )
        parser.add_argument("--dry-run", action="store_true", help="change nothing, only count")
        arguments.add_common_arguments(parser)

    def change(
        self,
        options: dict[str, Any],
        question: str,
        each: Callable[[list[str]], Iterator[Changed]],
        all_failed: Callable[[Failed, int], Iterator[Changed]],
    ) -> None:
        """Change the events that the options name: `each` of these keys, or `all_failed` of a kind."""
        using, keys = options["database"], options["keys"]
        self.check_database(using)
        chooses = any(options[name] for name in ("failed", "handler", "fingerprint", "since"))
        if bool(keys) == chooses:
            raise CommandError("Give keys, or --failed, --handler, --fingerprint or --since.")
        if keys:
            changed = self._report(options, each(keys), total=len(keys), count=len(keys))
            if not (changed or options["dry_run"]):
                raise CommandError("Nothing was changed.")
            return
        since = "-infinity"
        if options["since"] is not None:
            since = (timezone.now() - timedelta(seconds=options["since"])).isoformat()
        failed = Failed(options["handler"], options["fingerprint"], since)
        count = min(repair.count(failed, using=using), options["max"])
        self.stderr.write(f"{bounded(count, repair.COUNTED)} events have failed so.", style_func=str)
        if count and not options["dry_run"]:
            self.confirm(question, yes=options["yes"])
        self._report(options, all_failed(failed, options["max"]), total=count, count=count)

    def _report(
        self, options: dict[str, Any], changes: Iterator[Changed], *, total: int, count: int
    ) -> int:
        """Make the changes, unless it is a dry run, and say what they are; return how many events."""
        changed: list[str] = []
        left_out: list[str] = []
        is_interrupted = False
        try:
            for keys, reasons in () if options["dry_run"] else changes:
                changed += keys
                left_out += reasons
                self.show_progress(f"{len(changed):,} of {bounded(total, repair.COUNTED)}")
        except KeyboardInterrupt:
            is_interrupted = True
        self.show_progress("")
        if options["json"]:
            report = {"events": count, "changed": changed, "left_out": left_out}
            self.stdout.write(json.dumps({**report, "dry_run": options["dry_run"]}, indent=2))
        else:
            for reason in left_out:
                self.stderr.write(reason)
            said = f"{count:,} events are named." if options["dry_run"] else self.done
            self.stdout.write(said.format(count=len(changed)))
        if is_interrupted:
            raise CommandError("Stopped; run it again to go on.", returncode=130)
        return len(changed)
