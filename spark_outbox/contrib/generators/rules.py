"""A generator as it is evaluated: the definition of its source, and tests made of its conditions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from django.core.exceptions import ValidationError
from django.utils.translation import gettext

from spark_outbox import Event
from spark_outbox.contrib.generators.conditions import holds, operators, parse
from spark_outbox.contrib.generators.definitions import Definition
from spark_outbox.errors import SourceError

if TYPE_CHECKING:
    from spark_outbox.contrib.generators.models import Condition


class Test(NamedTuple):
    """A condition that makes sense."""

    variable: str
    operator: str
    wanted: Any
    kind: type

    @classmethod
    def of(cls, definition: Definition, variable: str, operator: str, text: str) -> Self:
        """Raise ValidationError, with the field that is wrong."""
        if (declared := definition.variables.get(variable)) is None:
            problem = gettext("The source has no such variable.")
            raise ValidationError({"variable": problem})
        if operator not in operators(declared.type):
            problem = gettext("This variable can only be compared by = and !=.")
            raise ValidationError({"operator": problem})
        try:
            return cls(variable, operator, parse(declared.type, text), declared.type)
        except ValidationError as error:
            raise ValidationError({"value": error.messages}) from error

    def is_met(self, context: Mapping[str, Any]) -> bool:
        """Raise SourceError if the context lacks the variable, or has another type there."""
        if self.variable not in context:
            raise SourceError(gettext("The context has no “%s”.") % self.variable)
        try:
            return holds(context[self.variable], self.operator, self.wanted, kind=self.kind)
        except TypeError as error:
            problem = gettext("“%(variable)s” can't be compared: %(why)s")
            raise SourceError(problem % {"variable": self.variable, "why": error}) from error


@dataclass(frozen=True, slots=True)
class Rule:
    """The event of a group, for each candidate whose context meets all tests."""

    group: str
    definition: Definition
    tests: list[Test]

    @classmethod
    def of(cls, group: str, source: str, conditions: "Iterable[Condition]") -> Self:
        """Raise ValidationError, with all that is wrong."""
        definition = Definition.of(source)
        tests, problems = [], []
        for each in conditions:
            try:
                tests.append(Test.of(definition, each.variable, each.operator, each.value))
            except ValidationError as error:
                problems.append(f"{each}: {' '.join(error.messages)}")
        if problems:
            raise ValidationError(problems)
        return cls(group, definition, tests)

    def unmet(self, context: Mapping[str, Any]) -> Test | None:
        """Return the first test that the context does not meet. Raises SourceError."""
        return next((test for test in self.tests if not test.is_met(context)), None)

    def event(self, candidate: Any, context: Mapping[str, Any]) -> Event:
        """Raise EmitError if it can't be stored, SourceError if the candidate has no key."""
        own = self.definition.key(candidate)
        if own is None or own == "":
            raise SourceError(gettext("It has no key."))
        event = Event(self.group, f"{self.group}_{own}", context=dict(context))
        event.check()
        return event
