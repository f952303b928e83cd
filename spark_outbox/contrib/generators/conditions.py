"""The types of variables: what a condition's text means for each, and comparing. Evaluates no code."""

import datetime as dt
import operator
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

from django import forms
from django.core.exceptions import ValidationError
from django.utils import timezone
from django.utils.text import capfirst
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
    "=": operator.eq,
    "!=": operator.ne,
}

UNORDERED = {"=", "!="}


class YesOrNo(forms.CharField):
    """True or false, as text."""

    def clean(self, value: Any) -> bool:
        found = {"true": True, "1": True, "false": False, "0": False}.get(super().clean(value).lower())
        if found is None:
            raise ValidationError(_("Enter true or false."))
        return found


ZONES = _("a time has a zone if, and only if, USE_TZ is set.")


class Time(forms.DateTimeField):
    """A time that has a zone if, and only if, USE_TZ is set."""

    def clean(self, value: Any) -> Any:
        found = super().clean(value)
        if timezone.is_aware(found) != timezone.is_aware(timezone.now()):
            raise ValidationError(capfirst(ZONES))
        return found


class Kind(NamedTuple):
    """A type of variables."""

    field: forms.Field
    """Makes a value of a condition's text, or says what is wrong with it."""
    name: Any
    """What people call it."""
    also: tuple[type, ...] = ()
    """Other types that compare with it."""


KINDS: dict[type, Kind] = {
    int: Kind(forms.IntegerField(), _("whole number")),
    float: Kind(forms.FloatField(), _("number"), (int,)),
    Decimal: Kind(forms.DecimalField(max_digits=100), _("number"), (int,)),
    bool: Kind(YesOrNo(), _("true or false")),
    str: Kind(forms.CharField(required=False), _("text")),
    dt.date: Kind(forms.DateField(), _("date")),
    dt.datetime: Kind(Time(), _("time")),
}


def parse(kind: type, text: str) -> Any:
    """Return the value that a condition's text means. Raises ValidationError."""
    return KINDS[kind].field.clean(text)


def to_text(value: Any) -> str:
    """Return what `parse` makes the same value of, in every language."""
    if isinstance(value, bool):
        return str(value).lower()
    return value.isoformat() if isinstance(value, dt.date) else str(value)


def operators(kind: type) -> set[str]:
    return UNORDERED if kind is bool else set(OPERATORS)


def holds(value: Any, compared: str, wanted: Any, *, kind: type) -> bool:
    """Compare a value of a context. None and NaN meet no condition.

    Raises TypeError, with an explanation, if the value can't be compared as this kind.
    """
    if value is None:
        return False
    own = next((each for each in type(value).__mro__ if each in KINDS), object)
    if own is not kind and own not in KINDS[kind].also:
        names = {"type": type(value).__name__, "declared": kind.__name__}
        raise TypeError(gettext("its type is %(type)s, not %(declared)s.") % names)
    if value != value:  # noqa: PLR0124, it is NaN
        return False
    try:
        wanted < value  # noqa: B015, raises if only one of two times has a zone, which == does not
    except TypeError:
        raise TypeError(str(ZONES)) from None
    return bool(OPERATORS[compared](value, wanted))
