"""The system check: whether active generators can be evaluated by this code."""

from collections.abc import Iterator, Sequence
from typing import Any

from django.core.checks import CheckMessage, Tags, Warning, register  # noqa: A004
from django.core.exceptions import ValidationError
from django.db import connections, router

LOOKED_AT = 1000
"""How many generators are looked at."""


def register_checks() -> None:
    register(check_generators, Tags.database)


def check_generators(databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Run by `migrate` and `check --database`."""
    from spark_outbox.contrib.generators.models import Generator

    return [
        message
        for alias in databases or ()
        if router.allow_migrate_model(alias, Generator)
        and Generator._meta.db_table in connections[alias].introspection.table_names()
        for message in _problems(alias)
    ]


def _problems(alias: str) -> Iterator[CheckMessage]:
    from spark_outbox.contrib.generators.models import Generator

    active = Generator.objects.using(alias).filter(is_active=True).order_by("pk")
    for generator in active.prefetch_related("conditions")[:LOOKED_AT]:
        try:
            generator.rule(generator.conditions.all())
        except ValidationError as error:
            yield Warning(
                f"The generator {generator} in database {alias!r} can't be evaluated: "
                f"{' '.join(error.messages)}",
                hint="Edit or deactivate it in the admin, or register what it needs.",
                id="spark_outbox_generators.W001",
            )
