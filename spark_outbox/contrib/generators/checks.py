"""The system check: whether active generators can be evaluated by this code."""

from collections.abc import Iterator, Sequence
from typing import Any

from django.core import checks
from django.core.checks import CheckMessage, Tags
from django.core.exceptions import ValidationError
from django.db import ProgrammingError, connections, transaction

from spark_outbox.contrib.generators.models import Generator

LOOKED_AT = 1000
"""How many generators are looked at."""


def register_checks() -> None:
    checks.register(check_generators, Tags.database)


def check_generators(databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Run by `migrate` and `check --database`."""
    found: list[CheckMessage] = []
    for alias in databases or ():
        if connections[alias].vendor == "postgresql":
            try:
                with transaction.atomic(using=alias):
                    found += _problems(alias)
            except ProgrammingError:
                pass  # the tables are not there, or this role may not read them
    return found


def _problems(alias: str) -> Iterator[CheckMessage]:
    active = Generator.objects.using(alias).filter(is_active=True).order_by("pk")
    for generator in active.prefetch_related("conditions")[:LOOKED_AT]:
        try:
            generator.rule(generator.conditions.all())
        except ValidationError as error:
            yield checks.Warning(
                f"The generator {generator} in database {alias!r} can't be evaluated: "
                f"{' '.join(error.messages)}",
                hint="Edit or deactivate it in the admin, or register what it needs.",
                id="spark_outbox_generators.W001",
            )
