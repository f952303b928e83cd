"""What a generator would emit now, of its first candidates: a page waits for it. Writes nothing."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from django.core.exceptions import ValidationError
from django.db import DatabaseError, ProgrammingError, router, transaction
from django.db.models import QuerySet
from django.utils.translation import gettext

from spark_outbox.contrib.generators.models import Generator
from spark_outbox.contrib.generators.rules import Rule
from spark_outbox.errors import EmitError, SourceError, describe
from spark_outbox.models import OutboxEvent

LOOKED_AT = 500
"""How many candidates are looked at."""

SHOWN = 20
"""How many of them are shown, of each kind."""


class Look(NamedTuple):
    """A candidate: the key of its event, or why it gets none."""

    candidate: str
    key: str = ""
    why: str = ""
    has_failed: bool = False


class Part(NamedTuple):
    title: str
    number: int
    looks: list[Look]


class Preview(NamedTuple):
    problems: list[str]
    looked_at: int
    is_cut: bool
    parts: list[Part]


def preview(generator: Generator) -> Preview:
    """Look at candidates as the sweep would if the generator were active."""
    using = router.db_for_write(Generator)
    problems: list[str] = []
    looks: list[Look] = []
    with transaction.atomic(using=using):
        try:
            looks.extend(_looks(generator.rule(generator.conditions.all())))
        except ValidationError as error:
            problems += error.messages
        except Exception as error:  # noqa: BLE001, shown
            problems.append(gettext("A look at the candidates ended with: %s") % describe(error))
        transaction.set_rollback(True, using=using)
    try:
        known = _known({look.key for look in looks if look.key}, using=using)
    except ProgrammingError:
        known = set()
        problems.append(gettext("The role of this database connection may not read keys."))
    new = {each.key: each for each in reversed(looks) if each.key and each.key not in known}
    parts = {
        gettext("Would be emitted"): [each for each in looks if new.get(each.key) is each],
        gettext("Known already"): [each for each in looks if each.key and new.get(each.key) is not each],
        gettext("Conditions not met"): [each for each in looks if not each.key and not each.has_failed],
        gettext("Failed"): [each for each in looks if each.has_failed],
    }
    return Preview(
        problems,
        len(looks),
        len(looks) == LOOKED_AT,
        [Part(title, len(each), each[:SHOWN]) for title, each in parts.items() if each],
    )


def _looks(rule: Rule) -> Iterator[Look]:
    candidates = rule.definition.candidates()
    if isinstance(candidates, QuerySet):
        candidates = candidates[:LOOKED_AT]
    for candidate in islice(candidates, LOOKED_AT):
        try:
            yield _look(rule, candidate)
        except DatabaseError:
            raise  # in this transaction no other query would work
        except (SourceError, EmitError) as error:
            yield Look(_text(candidate), why=str(error), has_failed=True)
        except Exception as error:  # noqa: BLE001, shown
            yield Look(_text(candidate), why=describe(error), has_failed=True)


def _look(rule: Rule, candidate: Any) -> Look:
    context = rule.definition.context(candidate)
    if (test := rule.unmet(context)) is None:
        return Look(_text(candidate), key=rule.event(candidate, context).key)
    wanted = f"{test.variable} {test.operator} {_text(test.wanted)}"
    names = {"condition": wanted, "value": _text(context[test.variable])}
    return Look(_text(candidate), why=gettext("Not %(condition)s: it is %(value)s.") % names)


def _text(value: Any) -> str:
    try:
        return f"{value!s:.100}"
    except Exception:  # noqa: BLE001, it is the project's
        return type(value).__name__


def _known(keys: set[str], *, using: str) -> set[str]:
    with transaction.atomic(using=using):
        return set(OutboxEvent.objects.using(using).filter(key__in=keys).values_list("key", flat=True))
