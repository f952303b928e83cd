"""The templates of mails: Django's language without the tags that reach beyond the event.

There is no `load`, `include`, `extends`, `url` or `debug`. But what the values of an event can do, a
template can have them do: Django calls their methods, except those that are marked with `alters_data`.
"""

from collections.abc import Mapping
from typing import Any

from django.core.exceptions import ValidationError
from django.template import Context, Engine, Library, Template, TemplateSyntaxError
from django.template import defaultfilters as filters
from django.template import defaulttags as tags
from django.template.base import FilterExpression, VariableNode
from django.utils.translation import gettext as _

TAGS = (
    *("autoescape", "comment", "cycle", "filter", "firstof", "for", "if", "ifchanged", "now", "regroup"),
    *("resetcycle", "spaceless", "templatetag", "verbatim", "widthratio", "with"),
)

register = Library()
register.tags = {name: tags.register.tags[name] for name in TAGS}
register.filters = filters.register.filters


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
    """Render a template. What it shows and is missing, None or empty, is added to `empty`."""
    template = Template(source, engine=engine)
    if empty is not None:
        nodes: list[Any] = template.nodelist.get_nodes_by_type(VariableNode)
        for node in nodes:
            node.filter_expression = _Watched(node.filter_expression, empty)
    rendered = template.render(Context(dict(values), autoescape=engine.autoescape))
    return rendered + ""  # no SafeString: a page that shows it has to escape it


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
