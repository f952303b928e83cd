"""Generators and their conditions, which people edit in the admin."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from spark_outbox.contrib.generators.conditions import OPERATORS, to_text
from spark_outbox.contrib.generators.definitions import MAX_LENGTH, Definition
from spark_outbox.contrib.generators.rules import Rule, Test

if TYPE_CHECKING:
    from django.db.models.fields.related_descriptors import RelatedManager


class Generator(models.Model):
    """An event of this group for each candidate of a source that meets all conditions."""

    id = models.BigAutoField(primary_key=True)
    group = models.CharField(
        _("group"),
        max_length=200,
        db_column="event_group",
        help_text=_("Once for each candidate. In another group, all are new."),
    )
    source = models.CharField(_("source"), max_length=MAX_LENGTH)
    is_active = models.BooleanField(_("is active"), default=False)

    conditions: "RelatedManager[Condition]"

    class Meta:
        db_table = "spark_outbox_generator"
        required_db_vendor = "postgresql"
        verbose_name = _("generator")
        verbose_name_plural = _("generators")
        permissions = [("preview_generator", "Can preview generators")]

    def __str__(self) -> str:
        return self.group

    def clean(self) -> None:
        """Raise ValidationError if keys could clash. One that clashes can still be deactivated."""
        stored = Generator.objects.using(self._state.db).filter(pk=self.pk, group=self.group)
        if (self.is_active or not stored.exists()) and (clash := self.clash()):
            raise ValidationError(clash)

    def rule(self, conditions: "Iterable[Condition]") -> Rule:
        """Raise ValidationError, with all that is wrong."""
        if clash := self.clash():
            raise ValidationError(clash)
        return Rule.of(self.group, self.source, conditions)

    def clash(self) -> str:
        """Return why the keys of this group could be those of other candidates; "" if they can't."""
        others = clashing(self.group, self.source).using(self._state.db)
        for source in others.values_list("source", flat=True)[:1]:
            text = gettext("This group is used with the source “%(source)s”: keys could be the same.")
            return text % {"source": source}
        return ""


def clashing(group: object, source: object) -> models.QuerySet[Generator]:
    """Return the generators that use a group with another source than this."""
    return Generator.objects.filter(group=group).exclude(source=source)


class Condition(models.Model):
    """A comparison of a variable with a value, which is stored as text."""

    id = models.BigAutoField(primary_key=True)
    generator = models.ForeignKey(
        Generator, models.CASCADE, related_name="conditions", verbose_name=_("generator")
    )
    variable = models.CharField(_("variable"), max_length=MAX_LENGTH)
    operator = models.TextField(_("operator"), choices=[(each, each) for each in OPERATORS])
    value = models.CharField(
        _("value"),
        max_length=255,
        blank=True,
        help_text=_("For example 5, 2.50, true, 2026-12-31 or 2026-12-31 18:00."),
    )

    class Meta:
        db_table = "spark_outbox_condition"
        required_db_vendor = "postgresql"
        ordering = ["pk"]
        verbose_name = _("condition")
        verbose_name_plural = _("conditions")
        constraints = [
            models.CheckConstraint(
                name="spark_outbox_condition_operator", condition=Q(operator__in=list(OPERATORS))
            )
        ]

    def __str__(self) -> str:
        return f"{self.variable} {self.operator} {self.value}"

    def clean(self) -> None:
        """Store the value in one spelling. Raises ValidationError for what could not be evaluated."""
        if self.variable and self.operator:  # else the fields have said what is wrong
            definition = Definition.of(self.generator.source)
            test = Test.of(definition, self.variable, self.operator, self.value)
            self.value = to_text(test.wanted)
