"""spark_catalogue: what is emitted, who handles it, and what payloads look like; but no value of one."""

import datetime as dt
import io
import json
from decimal import Decimal

import pytest
from django.core.management import call_command
from django.db import connection
from markdown_it import MarkdownIt

from spark_outbox import emit, handler, source
from spark_outbox.operating.catalogue import catalogue, shape_of
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Challenge
from tests.store.conftest import logins  # noqa: F401, a fixture
from tests.tools import manage

pytestmark = pytest.mark.django_db(transaction=True)


def printed(*arguments):
    out = io.StringIO()
    call_command("spark_catalogue", *arguments, stdout=out)
    return out.getvalue()


@pytest.fixture
def project(own_registry):
    handler(r"^order_", name="shop.mail", max_attempts=3, timeout=30, discard_for=(KeyError,))(
        lambda event: None
    )
    handler(r"_paid$", name="shop.book", batch=100, backoff=[1, dt.timedelta(minutes=1)])(
        lambda events: None
    )

    @source(Challenge)
    def challenges(challenge):
        return []

    challenge = Challenge.objects.create(
        title="Run", start_date=dt.date(2026, 1, 1), end_date=dt.date(2999, 1, 1)
    )
    emit("order_paid", "first", amount=Decimal("5.10"), to="anna@example.com", challenge=challenge)
    emit("order_paid", "second", amount=None, to="bob@example.com", lines=[{"secret": 1}, "x"])
    Worker().drain()
    emit("mystery", "third", delay=60)


def test_the_catalogue_as_json(project):
    found = json.loads(printed("--json"))
    assert found["groups"] == [
        {"name": "mystery", "handlers": [], "payload": {}},
        {
            "name": "order_paid",
            "handlers": ["shop.mail", "shop.book"],
            "payload": {
                "amount": "decimal | null",
                "challenge": "model challenges.challenge?",
                "lines": "list of object of integer | string?",
                "to": "string",
            },
        },
    ]
    mail, book = found["handlers"]
    assert mail == {
        "name": "shop.mail",
        "pattern": "^order_",
        "kind": "plain",
        "groups": ["order_paid"],
        "max_attempts": 3,
        "backoff": "1s",
        "timeout": 30,
        "retry_for": ["BaseException"],
        "discard_for": ["KeyError"],
        "batch": None,
    }
    assert (book["kind"], book["batch"], book["backoff"]) == ("list", 100, "1s, 60s")
    ((one,),) = [found["sources"]]
    assert one["model"] == "challenges.Challenge"
    assert one["functions"][0].endswith("challenges")


def test_the_catalogue_as_markdown_has_no_value_of_a_payload(project):
    emit("strange|group `<b>`", "strange")
    text = printed()
    assert "| `amount` | decimal \\| null |" in text
    assert "Handled by `shop.mail`, `shop.book`." in text
    assert "Handled by nobody." in text
    for secret in ("anna", "bob", "5.10", "secret", "first"):
        assert secret not in text
    tokens = MarkdownIt().enable("table").parse(text)
    headings = [tokens[at + 1].content for at, t in enumerate(tokens) if t.type == "heading_open"]
    assert headings[0] == "Events"
    assert headings[-2:] == ["Handlers", "Sources"]
    assert not [t for t in tokens if t.type == "html_block"]


def test_an_empty_project_has_a_catalogue(own_registry):
    assert "None." in printed()


def test_what_no_emit_has_written_does_no_harm():
    assert shape_of("[]") is None
    assert shape_of("{") is None
    assert shape_of('{"$": ["dict", []]}') == {}
    assert shape_of('{"a": {"$": ["model", 5]}, "b": {"$": []}}') == {
        "a": "unknown",
        "b": "object of list",
    }
    assert shape_of('{"anna@example.com": 1}') == {"(other)": "integer"}
    assert shape_of('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}") is None


def test_a_role_that_sees_no_payloads_gets_the_rest(logins):  # noqa: F811
    emit("g", "key", secret=1)
    done = manage("spark_catalogue", "--json", url=logins.url("viewer"))
    assert done.returncode == 0, done.stderr
    assert {"name": "g", "handlers": [], "payload": None} in json.loads(done.stdout)["groups"]


def test_of_many_events_few_are_read(own_registry, django_assert_max_num_queries):
    with connection.cursor() as cursor:
        cursor.execute(
            "insert into spark_outbox_event (key, event_group, payload) "
            "select 'k ' || n, 'g', '{\"a\": 1}' from generate_series(1, 2000) as n"
        )
    with django_assert_max_num_queries(6):
        assert catalogue(own_registry, using="default").groups[0].payload == {"a": "integer"}
