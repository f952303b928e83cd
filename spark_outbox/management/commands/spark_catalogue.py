"""Print the event catalogue; see spark_outbox/operating/catalogue.py."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from django.core.management.base import CommandParser

from spark_outbox.management import arguments
from spark_outbox.management.command import OutboxCommand
from spark_outbox.operating.catalogue import Catalogue, Described, Group, catalogue
from spark_outbox.registry.handlers import registry


class Command(OutboxCommand):
    help = (
        "Prints a catalogue of events as Markdown: the groups in the outbox and the types of their "
        "payloads, but no values; the handlers and their policies; the sources."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        arguments.add_common_arguments(parser, asks=False)

    def handle(self, **options: Any) -> None:
        self.check_database(options["database"])
        found = catalogue(registry, using=options["database"])
        if options["json"]:
            document = {
                part: [each._asdict() for each in entries] for part, entries in found._asdict().items()
            }
            self.stdout.write(json.dumps(document, indent=2))
        else:
            self.stdout.write("\n".join(_lines(found)))


def _lines(found: Catalogue) -> Iterator[str]:
    yield "# Events"
    for group in found.groups:
        yield from ["", f"## {_text(group.name)}", "", *_group(group)]
    yield from ["", "# Handlers", ""]
    yield from _table(
        ["handler", "groups", "kind", "attempts", "backoff", "timeout", "errors"],
        [
            [
                _code(handler.name),
                _code(handler.pattern),
                handler.kind + (f", up to {handler.batch}" if handler.batch else ""),
                str(handler.max_attempts),
                handler.backoff,
                "" if handler.timeout is None else f"{handler.timeout:g}s",
                _errors(handler),
            ]
            for handler in found.handlers
        ],
    )
    yield from ["", "# Sources", ""]
    sources = [[source.model, ", ".join(map(_code, source.functions))] for source in found.sources]
    yield from _table(["model", "sources"], sources)


def _group(group: Group) -> Iterator[str]:
    yield "Handled by " + (", ".join(map(_code, group.handlers)) or "nobody") + "."
    if group.payload:
        yield ""
        yield from _table(["payload", "type"], [[_code(k), _text(v)] for k, v in group.payload.items()])
    elif group.payload is not None:
        yield from ["", "Its payload is empty."]


def _errors(handler: Described) -> str:
    parts = []
    if handler.retry_for != ["BaseException"]:
        parts.append(f"retries {', '.join(handler.retry_for) or 'nothing'}")
    if handler.discard_for:
        parts.append(f"discards {', '.join(handler.discard_for)}")
    return "; ".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        yield "None."
        return
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"


def _code(text: str) -> str:
    """Return text from the project or the outbox as code; whatever is in it, it stays in its cell."""
    line = " ".join(text.split()).replace("|", "\\|")
    return f"`` {line} ``" if "`" in line else f"`{line}`"


def _text(text: str) -> str:
    """Return it as plain text."""
    line = " ".join(text.split())
    return "".join("\\" + letter if letter in "\\`*_{}[]<>#|" else letter for letter in line)
