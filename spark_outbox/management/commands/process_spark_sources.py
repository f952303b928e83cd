"""Pass all instances of models to their sources, for events that depend on time, and for repairs."""

import sys
from collections.abc import Iterable, Iterator
from traceback import format_exception
from typing import Any

from django.apps import apps
from django.core.management.base import CommandError, CommandParser
from django.db import router
from django.db.models import Model

from spark_outbox.emitting.emit import CHUNK_SIZE
from spark_outbox.emitting.sources import Sweep, sources_of, sweep, swept_models
from spark_outbox.errors import QUOTES_NOTHING, IdCollision, describe
from spark_outbox.management.command import OutboxCommand
from spark_outbox.registry.callables import path_of
from spark_outbox.registry.handlers import SourceFunction

FIRST_SWEEP = (
    "No event of the first {label} is known. Handlers will get the events of all {total} of them, "
    "however old these are. To have only what comes from now on handled, stop here, and give --as-done "
    "once. Go on?"
)


class Command(OutboxCommand):
    help = (
        "Passes all instances of models to their sources, and emits the events that have not been "
        "emitted yet. Run it from a timer for sources that depend on the date, and after an import that "
        "bypasses save(). If a source raises, the command prints the type and the place of the error; "
        "with --traceback also its message, which can quote data."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "models",
            nargs="*",
            metavar="app.Model",
            help="the models to sweep (default: all that have a source)",
        )
        parser.add_argument(
            "--source", metavar="NAME", help="only this source: its dotted path, or the end of it"
        )
        parser.add_argument(
            "--chunk-size",
            type=int,
            default=CHUNK_SIZE,
            metavar="N",
            help="instances and events in memory at once (default: %(default)s)",
        )
        parser.add_argument("--dry-run", action="store_true", help="emit nothing, only count")
        parser.add_argument(
            "--as-done",
            action="store_true",
            help="write the events as done: nothing is handled that was there before the outbox",
        )
        parser.add_argument("--yes", action="store_true", help="don't ask before a first sweep")
        parser.add_argument(
            "--database", metavar="ALIAS", help="default: where the router writes each model"
        )

    def handle(self, **options: Any) -> None:
        if options["chunk_size"] < 1:
            raise CommandError("--chunk-size must be 1 or more.")
        if options["database"] is not None:
            self.check_database(options["database"])
        errors = 0
        for model, sources in self._chosen(options["models"], options["source"]).items():
            try:
                errors += self._sweep(model, sources, options)
            except IdCollision as error:
                raise CommandError(str(error)) from error
        if errors:
            raise CommandError(f"Sources failed {errors} times; see above. The rest is emitted.")

    def _chosen(self, labels: list[str], source: str | None) -> dict[type[Model], list[SourceFunction]]:
        swept = swept_models()
        if labels:
            models = [self._model(label, swept) for label in labels]
            swept = {
                model: [f for f, first in sources_of(model) if first is model or first not in models]
                for model in models
            }
        chosen = {
            model: [f for f in functions if source is None or _matches(f, source)]
            for model, functions in swept.items()
        }
        chosen = {model: functions for model, functions in chosen.items() if functions}
        if source is not None and not chosen:
            known = sorted({path_of(f) for functions in swept.values() for f in functions})
            raise CommandError(f"There is no source {source!r}. Sources: {', '.join(known)}")
        if not chosen:
            self.stderr.write("No source is registered: nothing to do.")
        return chosen

    def _model(self, label: str, swept: Iterable[type[Model]]) -> type[Model]:
        known = ", ".join(model._meta.label for model in swept) or "none"
        try:
            model = apps.get_model(label)
        except (LookupError, ValueError):  # or it is not written as app.Model
            raise CommandError(f"There is no model {label!r}. Models with a source: {known}") from None
        if not sources_of(model):
            raise CommandError(f"{label} has no source. Models with one: {known}")
        return model

    def _sweep(self, model: type[Model], sources: list[SourceFunction], options: dict[str, Any]) -> int:
        using = options["database"] or router.db_for_write(model)
        total = model._default_manager.using(using).count() if sys.stderr.isatty() else 0
        label = model._meta.label

        def report(instance: Model, source: SourceFunction, error: Exception) -> None:
            is_plain = isinstance(error, QUOTES_NOTHING)
            what = f"{type(error).__name__}: {error}" if is_plain else describe(error)
            self.stderr.write(f"{label} {instance.pk!r}: {path_of(source)} raised {what}")
            if options["traceback"]:
                self.stderr.write("".join(format_exception(error)))

        def swept(**how: Any) -> Iterator[Sweep]:
            size = options["chunk_size"]
            return sweep(model, sources, using=using, chunk_size=size, **how)

        asks = not (options["yes"] or options["as_done"] or options["dry_run"])
        if total and asks and sys.stdin.isatty():
            first = next(swept(dry_run=True, on_error=lambda *_: None), Sweep())
            if first.events == first.new > 0:
                self.confirm(FIRST_SWEEP.format(label=label, total=total), yes=False)
        count = Sweep()
        how = {"dry_run": options["dry_run"], "as_done": options["as_done"], "on_error": report}
        for count in swept(**how):
            if total:
                self._show_progress(label, count.instances, total)
        self.stdout.write(
            f"{label}: {count.instances} instances, {count.events} events, {count.new} new"
            + (" (dry run: nothing was emitted)" if options["dry_run"] else "")
            + (", as done" if options["as_done"] else "")
        )
        return count.errors

    def _show_progress(self, label: str, done: int, total: int) -> None:
        filled = min(30, 30 * done // total)
        bar = "█" * filled + "·" * (30 - filled)
        self.stderr.write(
            f"\r{label} {bar} {done}/{total}", ending="\n" if done >= total else "", style_func=str
        )
        self.stderr.flush()


def _matches(function: SourceFunction, name: str) -> bool:
    return f".{path_of(function)}".endswith(f".{name}")
