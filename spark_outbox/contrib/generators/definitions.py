"""The registered sources of generators. Filled at import, before there are models; runs no SQL."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import isasyncgenfunction, iscoroutinefunction
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from django.core.exceptions import ValidationError
from django.utils.translation import gettext

from spark_outbox.contrib.generators.conditions import KINDS
from spark_outbox.errors import RegistrationError

if TYPE_CHECKING:
    from django.utils.functional import _StrOrPromise as Text

MAX_LENGTH = 100
"""The most characters of the name of a source or a variable."""


class Variable(NamedTuple):
    """A value of a context that conditions can be about."""

    type: type
    description: "Text" = ""


@dataclass(frozen=True, slots=True)
class Definition:
    """A source: what events can be about, and what conditions can ask of each."""

    name: str
    candidates: Callable[[], Iterable[Any]]
    context: Callable[[Any], Mapping[str, Any]]
    variables: Mapping[str, Variable]
    verbose_name: "Text"
    key: Callable[[Any], object]

    @classmethod
    def of(cls, source: str) -> "Definition":
        """Raise ValidationError if there is none."""
        if source not in SOURCES:
            problem = gettext("The source “%(source)s” is not registered.")
            raise ValidationError(problem % {"source": source})
        return SOURCES[source]


SOURCES: dict[str, Definition] = {}


def register_source(
    name: str,
    *,
    candidates: Callable[[], Iterable[Any]],
    context: Callable[[Any], Mapping[str, Any]],
    variables: Mapping[str, type | Variable],
    verbose_name: "Text | None" = None,
    key: Callable[[Any], object] = attrgetter("pk"),
) -> None:
    """Let generators be made of this source; they store it under `name`.

    `candidates` returns a queryset, which is streamed, or another iterable. `context` returns the values
    that are known of a candidate: they are the event's context. `variables` names those that conditions
    can be about, with the type of each: int, float, Decimal, bool, str, date or datetime. `key` tells
    candidates apart; an event's key is the group, an underscore, and this. Raises RegistrationError.
    """
    _check_name("source", name)
    if name in SOURCES:
        raise RegistrationError(f"There is a source {name!r} of generators already.")
    for option, function in (("candidates", candidates), ("context", context), ("key", key)):
        if not callable(function) or iscoroutinefunction(function) or isasyncgenfunction(function):
            raise RegistrationError(
                f"The {option} of source {name!r} must be a plain function, not {type(function)}."
            )
    if not isinstance(variables, Mapping):
        raise RegistrationError(f"The variables of source {name!r} are a dict of names and types.")
    found = {
        each: given if isinstance(given, Variable) else Variable(given)
        for each, given in variables.items()
    }
    for each, variable in found.items():
        _check_name("variable", each)
        if variable.type not in list(KINDS):
            known = ", ".join(kind.__name__ for kind in KINDS)
            raise RegistrationError(
                f"The variable {each!r} of source {name!r} must have one of these types: {known}."
            )
    verbose_name = name if verbose_name is None else verbose_name  # not read: it may be a translation
    SOURCES[name] = Definition(name, candidates, context, found, verbose_name, key)


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_LENGTH:
        raise RegistrationError(f"The name of a {what} has 1 to {MAX_LENGTH} characters, not {name!r}.")
