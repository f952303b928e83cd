"""What the search field, the filters and the links of a list ask for."""

import re
from collections.abc import Collection

from django.http import QueryDict
from django.utils.translation import gettext_lazy as _

from spark_outbox.store.listing import Range, Wanted
from spark_outbox.store.reading import HIGHEST_ID, LOWEST_ID

HELP = _(
    "A key, or how it begins; group:NAME, handler:NAME, or error:TEXT for a part of an error. "
    "Several terms must all fit."
)

PLACES = ("before", "after")
"""The parameters that say where a page begins."""

_TERM = re.compile(r"(?:^|(?<=\s))(key|group|handler|error):")


def wanted(asked: QueryDict, *, states: Collection[str]) -> Wanted:
    """Return what is wanted; a term of the search field replaces the filter of that name."""
    first, *terms = _TERM.split(_text(asked, "q"))
    found = {name: _text(asked, name) for name in ("state", "group", "handler")}
    found |= {"key": first.strip()} if first.strip() else {}
    found |= {name: value.strip() for name, value in zip(terms[::2], terms[1::2], strict=True)}
    if found["state"] not in states:
        found["state"] = ""
    fingerprint = _text(asked, "fingerprint") if "fingerprint" in asked else None
    return Wanted(**found, fingerprint=fingerprint)


def place(asked: QueryDict) -> Range:
    """Return where the page begins."""
    return Range(**{name: number(asked.get(name, "")) for name in PLACES})


def number(text: str) -> int | None:
    """Return an id; None if it is none."""
    if not re.fullmatch(r"-?[0-9]{1,19}", text):
        return None
    return found if LOWEST_ID <= (found := int(text)) <= HIGHEST_ID else None


def _text(asked: QueryDict, name: str) -> str:
    return asked.get(name, "").replace("\x00", "")
