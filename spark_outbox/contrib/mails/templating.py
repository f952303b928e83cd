"""The templates of mails: Django's language without the tags that reach beyond the event.

There is no `load`, `include`, `extends`, `url` or `debug`. But what the values of an event can do, a
template can have them do: Django calls their methods, except those that are marked with `alters_data`.
A template that takes too long, or becomes too long, raises TooMuch.
"""

import re
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from django.core.exceptions import ValidationError
from django.template import Context, Engine, Library, Template, TemplateSyntaxError
from django.template import defaultfilters as filters
from django.template import defaulttags as tags
from django.template.base import FilterExpression, Node, TextNode, VariableNode
from django.utils.translation import gettext as _

TAGS = (
    *("autoescape", "comment", "cycle", "filter", "firstof", "for", "if", "ifchanged", "now", "regroup"),
    *("resetcycle", "spaceless", "templatetag", "verbatim", "widthratio", "with"),
)

SECONDS = 10.0
"""How long a template may render."""

LONGEST = 10_000_000
"""How many characters a template, or one of its filters, may make."""

WIDE = re.compile(r"[\d_]{4}")
"""A width or a precision that is too large; Python reads 1_000 as a number, too."""


class TooMuch(Exception):
    """A template would make more, or take longer, than one mail needs."""


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose result is not too long."""

    @wraps(function)
    def bounded(value: Any, *args: Any, **options: Any) -> Any:
        if name in {"center", "floatformat", "ljust", "rjust", "stringformat"}:
            args = tuple(map(str, args))  # a Decimal of few digits may be a large number
            if any(map(WIDE.search, args)):
                raise TooMuch(f"The filter {name!r} would make too much.")
        if name == "join" and isinstance(value, str | list) and len(value) * len(str(args[0])) > LONGEST:
            raise TooMuch("The filter 'join' would make too much.")
        found = function(value, *args, **options)
        if isinstance(found, str | list) and len(found) > LONGEST:
            raise TooMuch(f"The filter {name!r} makes too much.")
        return found

    return bounded


register = Library()
register.tags = {name: tags.register.tags[name] for name in TAGS}
register.filters = {name: _bounded(name, each) for name, each in filters.register.filters.items()}


class _Engine(Engine):
    default_builtins = [__name__]


TEXT = _Engine(loaders=[], autoescape=False)
HTML = _Engine(loaders=[])


def check(source: str) -> None:
    """Raise ValidationError unless it is a template."""
    try:
        Template(source, engine=TEXT)
    except TemplateSyntaxError as error:
        raise ValidationError(str(error)) from error
    except RecursionError as error:
        raise ValidationError(_("Its tags are nested too deeply.")) from error


def render(
    source: str, values: Mapping[str, Any], *, engine: Engine = TEXT, empty: set[str] | None = None
) -> str:
    """Render a template. What it shows and is missing, None or empty, is added to `empty`.

    Raises TooMuch.
    """
    template = Template(source, engine=engine)
    limit = _Limit()
    loops: list[Any] = template.nodelist.get_nodes_by_type(tags.ForNode)
    for loop in loops:
        loop.nodelist_loop.append(TextNode(""))  # an empty loop takes its time as well
    nodes: list[Any] = template.nodelist.get_nodes_by_type(Node)
    for node in nodes:
        if empty is not None and isinstance(node, VariableNode):
            watched: Any = _Watched(node.filter_expression, empty)
            node.filter_expression = watched
        node.render_annotated = limit.on(node.render_annotated)
    rendered = template.render(Context(dict(values), autoescape=engine.autoescape))
    return rendered + ""  # no SafeString: a page that shows it has to escape it


class _Limit:
    """How much of a template may still be rendered, and until when."""

    def __init__(self) -> None:
        self._left = LONGEST
        self._end = time.monotonic() + SECONDS

    def on(self, render: Callable[[Context], str]) -> Callable[[Context], str]:
        """Return what renders a part of the template, and raises TooMuch."""

        def limited(context: Context) -> str:
            text = render(context)
            self._left -= len(text)
            if self._left < 0:
                raise TooMuch(f"It has more than {LONGEST:,} characters.")
            if time.monotonic() > self._end:
                raise TooMuch(f"It takes longer than {SECONDS:g} s.")
            return text

        return limited


class _Watched:
    """An expression in a template, which adds itself to a set when it comes to nothing."""

    def __init__(self, expression: FilterExpression, empty: set[str]) -> None:
        self._expression = expression
        self._empty = empty

    def resolve(self, context: Context) -> Any:
        value = self._expression.resolve(context)
        if value is None or value == "":
            self._empty.add(self._expression.token)
        return value
