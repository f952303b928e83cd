"""Numbers, ages and times, as people read them."""

from datetime import UTC, datetime

from django.utils.dateparse import parse_datetime
from django.utils.formats import number_format
from django.utils.timezone import localtime
from django.utils.translation import gettext as _


def number(value: int, *, is_bounded: bool = False) -> str:
    """Return a count; with `is_bounded` there may be more."""
    text = number_format(value, use_l10n=True, force_grouping=True)
    return f"{text}+" if is_bounded else text


def age(seconds: float | None) -> str:
    """Return roughly how long something lasts, or how long ago it was; "" for None."""
    if seconds is None:
        return ""
    if seconds >= 2 * 86_400:
        return _("%(number)s d") % {"number": number(int(seconds // 86_400))}
    if seconds >= 2 * 3600:
        return _("%(number)s h") % {"number": int(seconds // 3600)}
    if seconds >= 2 * 60:
        return _("%(number)s min") % {"number": int(seconds // 60)}
    return _("%(number)s s") % {"number": max(0, int(seconds))}


def duration(seconds: float | None) -> str:
    """Return how long a call took; "" for None."""
    if seconds is None:
        return ""
    if seconds < 1:
        return _("%(number)s ms") % {"number": number_format(seconds * 1000, 1 if seconds < 0.1 else 0)}
    return _("%(number)s s") % {"number": number_format(seconds, 2)}


def time(text: str | None) -> str:
    """Return a time of PostgreSQL's JSON to the second, in the current time zone."""
    moment = _parsed(text)
    return text or "" if moment is None else f"{localtime(moment):%Y-%m-%d %H:%M:%S}"


def ago(text: str | None) -> str:
    """Return how long ago it was."""
    moment = _parsed(text)
    if moment is None:
        return text or ""
    return _("%(age)s ago") % {"age": age((datetime.now(UTC) - moment).total_seconds())}


def _parsed(text: str | None) -> datetime | None:
    """Return None for a time that Python does not know, such as infinity."""
    try:
        moment = parse_datetime(text or "")
    except ValueError:
        return None
    return moment if moment and moment.tzinfo and 1 < moment.year < 9999 else None
