"""The pages of the admin that tests ask for, and what is in them."""

import html
import re

EVENTS = "/admin/spark_outbox/outboxevent/"
DELIVERIES = "/admin/spark_outbox/delivery/"


def get(client, path="", root=EVENTS, status=200, **query):
    answer = client.get(f"{root}{path}", query)
    assert answer.status_code == status, answer.text[:2000]
    return answer.text


def words(text):
    """Return what a page says, without its tags."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def listed(text, column="key"):
    """Return the cells of a column of a list."""
    cells = re.findall(rf'<t[dh] class="field-{column}[^"]*">(.*?)</t[dh]>', text, re.DOTALL)
    return [words(cell) for cell in cells]


def link(text, label):
    """Return the query behind a link."""
    found = re.search(rf'<a href="([^"]*)"[^>]*>{label}</a>', text)
    return html.unescape(found[1]) if found else None


def field(text, name):
    """Return the value of a hidden field."""
    return html.unescape(re.search(rf'type="hidden" name="{name}" value="([^"]*)"', text)[1])
