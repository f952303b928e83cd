"""Payloads and headers as HTML: indented JSON, in which references to model instances are links."""

import json
import re
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote

from django.apps import apps
from django.contrib.admin import AdminSite
from django.contrib.admin.exceptions import NotRegistered
from django.contrib.admin.utils import quote as quote_key
from django.db import router
from django.http import HttpRequest
from django.urls import NoReverseMatch, reverse
from django.utils.html import escape, format_html
from django.utils.safestring import SafeString, mark_safe

from spark_outbox.events.encoding import TAG

SHOWN = 20_000
"""How many characters of a document its event's page shows."""

LINKED = 1000
"""How many references it looks for the pages of."""

Find = Callable[[str, str, str], str]
"""Takes a model's label, the text of a key and an alias; returns an address, or "" if there is none."""


class Shown(NamedTuple):
    html: SafeString
    is_cut: bool


def as_text(document: Any) -> str:
    try:
        return json.dumps(document, indent=2, ensure_ascii=False)
    except RecursionError:  # C nests deeper than Python does
        return json.dumps(document, ensure_ascii=False)


def as_html(document: Any, find: Find) -> Shown:
    """Return the first SHOWN characters."""
    mark, links, tries = secrets.token_hex(8), list[str](), iter(range(LINKED))

    def marked(node: Any) -> Any:
        if isinstance(node, list):
            return [marked(each) for each in node]
        if not isinstance(node, dict):
            return node
        reference = _reference(node)
        if reference and next(tries, None) is not None and (url := find(*reference)):
            links.append(format_html('<a href="{}">{}</a>', url, json.dumps(node, ensure_ascii=False)))
            return f"{mark}{len(links) - 1}"
        return {name: marked(value) for name, value in node.items()}

    try:
        text = as_text(marked(document))
    except RecursionError:
        text = as_text(document)
    is_cut = len(text) > SHOWN
    if is_cut:
        whole_lines = text[:SHOWN].rpartition("\n")[0]
        text = whole_lines if len(whole_lines) > SHOWN // 2 else text[:SHOWN]
    html = re.sub(f"&quot;{mark}([0-9]+)&quot;", lambda found: links[int(found[1])], escape(text))
    return Shown(mark_safe(html), is_cut)  # noqa: S308, all text in it is escaped


def _reference(node: dict[str, Any]) -> tuple[str, str, str] | None:
    """Return the model's label, the key and the alias, if `node` is what events/encoding.py writes."""
    content = node.get(TAG) if len(node) == 1 else None
    if not isinstance(content, list) or len(content) != 4 or content[0] != "model":
        return None
    _, label, key, alias = content
    if isinstance(key, dict) and isinstance(tagged := key.get(TAG), list) and len(tagged) == 2:
        key = tagged[1]  # a UUID, for example
    if not (isinstance(label, str) and isinstance(key, str | int) and isinstance(alias, str)):
        return None
    return label, str(key), alias


def finder(request: HttpRequest, site: AdminSite) -> Find:
    """Return a function that finds the admin's pages of instances, if this user may see them. It runs no
    query for an instance: it may be gone."""

    def find(label: str, key: str, alias: str) -> str:
        try:
            model = apps.get_model(label)
            model_admin = site.get_model_admin(model)
        except (LookupError, ValueError, NotRegistered):
            return ""
        if alias not in (router.db_for_read(model), router.db_for_write(model)):
            return ""  # the admin would show another row of that key
        if not model_admin.has_view_or_change_permission(request):
            return ""
        name = f"admin:{model._meta.app_label}_{model._meta.model_name}_change"
        try:
            return reverse(name, args=[quote_key(key)], current_app=site.name)
        except NoReverseMatch:
            return ""

    return find


def file_name(key: str, name: str) -> str:
    """Return the header's value by which a browser names a file of this document."""
    return f"inline; filename*=UTF-8''{quote(f'{key}.{name}.json', safe='')}"
