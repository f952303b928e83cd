"""The sweep over generators: `process_spark_sources` has each active one yield its events."""

from collections.abc import Iterator

from django.core.exceptions import ValidationError
from django.db.models import QuerySet

from spark_outbox import Event, source
from spark_outbox.contrib.generators.models import Condition, Generator
from spark_outbox.errors import QUOTES_NOTHING, SourceError, describe

CHUNK_SIZE = 1000


@source(Generator, on_save=False)
def events_of(generator: Generator) -> Iterator[Event]:
    """Yield the events of all candidates. One that fails is passed over, and reported at the end.

    Raises SourceError.
    """
    conditions = reread(generator)
    if conditions is None:
        return
    try:
        rule = generator.rule(conditions)
    except ValidationError as error:
        raise SourceError(f"{generator}: {' '.join(error.messages)}") from error
    candidates = rule.definition.candidates()
    if isinstance(candidates, QuerySet):
        candidates = candidates.iterator(chunk_size=CHUNK_SIZE)
    failures, first = 0, None
    for candidate in candidates:
        try:
            context = rule.definition.context(candidate)
            event = rule.event(candidate, context) if rule.unmet(context) is None else None
        except Exception as error:  # noqa: BLE001, reported below
            failures, first = failures + 1, first or error
        else:
            if event:
                yield event
    if first:
        what = str(first) if isinstance(first, QUOTES_NOTHING) else describe(first)
        raise SourceError(f"{generator}: {failures} candidates failed, the first with {what}") from first


def reread(generator: Generator) -> list[Condition] | None:
    """Read it and its conditions in one statement, as somebody may have edited both since.

    Return the conditions; None if it is not active any more.
    """
    found = Generator.objects.using(generator._state.db).filter(pk=generator.pk, is_active=True)
    parts = [f"conditions__{part}" for part in ("variable", "operator", "value")]
    rows = list(found.order_by("conditions__pk").values_list("group", "source", *parts))
    if not rows:
        return None
    generator.group, generator.source = rows[0][:2]
    return [
        Condition(variable=variable, operator=operator, value=value)
        for _, _, variable, operator, value in rows
        if variable is not None  # it has no conditions
    ]
