"""The pages of the admin that tests ask for, and what is in them."""

import html
import re

from django.test import Client

EVENTS = "/admin/spark_outbox/outboxevent/"
DELIVERIES = "/admin/spark_outbox/delivery/"


def get(client: Client, path: str = "", root: str = EVENTS, status: int = 200, **query: str) -> str:
    answer = client.get(f"{root}{path}", query)
    assert answer.status_code == status, answer.text[:2000]
    return answer.text


def words(text: str) -> str:
    """Return what a page says, without its tags."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def listed(text: str, column: str = "key") -> list[str]:
    """Return the cells of a column of a list."""
    cells = re.findall(rf'<t[dh] class="field-{column}[^"]*">(.*?)</t[dh]>', text, re.DOTALL)
    return [words(cell) for cell in cells]


def link(text: str, label: str) -> str | None:
    """Return the query behind a link."""
    found = re.search(rf'<a href="([^"]*)"[^>]*>{label}</a>', text)
    return html.unescape(found[1]) if found else None


def field(text: str, name: str) -> str:
    """Return the value of a hidden field."""
    found = re.search(rf'type="hidden" name="{name}" value="([^"]*)"', text)
    assert found
    return html.unescape(found[1])
