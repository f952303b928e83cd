"""Take over the keys that django-spark has handled; see spark_outbox/operating/porting.py."""

import json
from typing import Any

from django.core.management.base import CommandError, CommandParser

from spark_outbox.management.arguments import add_common_arguments
from spark_outbox.management.command import OutboxCommand
from spark_outbox.operating import porting
from spark_outbox.store.porting import NAMELESS, Taken
from spark_outbox.worker.session import check_outbox

AGAIN = "Run it again once the last process with django-spark has stopped."

NO_TABLE = (
    "Database {using!r} has no table spark_event of django-spark. If another has one, copy it first."
)

FORGOTTEN = (
    "KEYS_RETENTION is set: keys that are older are forgotten some day. Then an event that a source, or "
    "your code, emits with one of them is handled once more."
)


class Command(OutboxCommand):
    help = (
        "Takes over the keys that django-spark has handled, from its table spark_event, so that no "
        "event is handled a second time. Run it after migrate and before the first worker, with all "
        "processes of django-spark stopped; if some are not, run it again when they are. It works in "
        "small transactions, and passes over keys that are known. Ctrl-C stops it; run it again to go "
        "on. It needs the role that owns the tables."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--discard-emitted",
            action="store_true",
            help="discard events that were emitted here meanwhile, and wait for handlers, if "
            "django-spark has handled their keys",
        )
        parser.add_argument("--dry-run", action="store_true", help="change nothing, only count")
        add_common_arguments(parser, asks=False)

    def handle(self, **options: Any) -> None:
        using = options["database"]
        self.check_database(using)
        check_outbox(None, using=using)
        if not porting.has_table(using=using):
            self.stderr.write(NO_TABLE.format(using=using))
            return
        total = self._take_over(options)
        if options["json"]:
            self.stdout.write(json.dumps({**total._asdict(), "dry_run": options["dry_run"]}, indent=2))
            return
        for line in self._lines(total, dry_run=options["dry_run"]):
            self.stdout.write(line)
        if total.new and self.settings().KEYS_RETENTION is not None:
            self.stderr.write(FORGOTTEN)

    def _take_over(self, options: dict[str, Any]) -> Taken:
        total = Taken()
        try:
            for total in porting.take_over(
                discards=options["discard_emitted"],
                dry_run=options["dry_run"],
                using=options["database"],
            ):
                self.show_progress(f"{total.read:,} keys")
        except KeyboardInterrupt:
            raise CommandError(
                f"Stopped. {total.new:,} keys are taken over; run it again to go on.", returncode=130
            ) from None
        finally:
            self.show_progress("")
        return total

    def _lines(self, total: Taken, *, dry_run: bool) -> list[str]:
        known = total.read - total.new - total.unfit
        lines = [f"{total.read:,} keys: {total.new:,} are new and done, {known:,} were known."]
        if total.mended:
            lines.append(
                f"{total.mended:,} had an empty or too long group: it is {NAMELESS!r} now, or cut."
            )
        if total.unfit:
            lines.append(
                f"{total.unfit:,} are left out: emit() takes no key that is empty or so long either."
            )
        if total.discarded:
            lines.append(f"{total.discarded:,} events that waited for handlers here are discarded.")
        if left := total.waiting - total.discarded:
            lines.append(
                f"{left:,} events with such keys wait for handlers here, which handle them once more. "
                "--discard-emitted gives them up, but for those that a worker has in hand."
            )
        lines.append("It was a dry run: nothing was changed." if dry_run else AGAIN)
        return lines
