"""Texts: whatever PostgreSQL can store arrives as it was, in whatever encoding the connection has."""

import pytest
from django.db import connection
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spark_outbox import emit, emit_many
from spark_outbox.models import OutboxEvent

pytestmark = pytest.mark.django_db

STRANGE = r"""
    NULL null "" '' {} {,} a,b (a) " \ \\ \" \n \u0041 \000 E'x' $1 $$ $ %s %% ; -- ä € 😀
""".split()  # noqa: SIM905
BLANK = [" ", "\n", "\r\n", "\t", "\x0b", "\x1f", "\x7f", "\x85", "\u2028", " a ", "a\nb"]

texts = st.sampled_from(STRANGE + BLANK) | st.text(
    st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=8
)
events = st.fixed_dictionaries(
    {"group": texts, "key": texts, "text": texts},
    optional={"ordering_key": texts, "headers": st.fixed_dictionaries({"text": texts})},
)


def columns():
    names = ["group", "key", "payload", "headers", "ordering_key"]
    return list(OutboxEvent.objects.order_by("id").values_list(*names))


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(events, max_size=6, unique_by=lambda event: event["key"]))
@example([{"group": text, "key": text, "text": text} for text in STRANGE + BLANK])
@example([{"group": "g", "key": text, "text": "", "ordering_key": text} for text in STRANGE + BLANK])
def test_any_text_arrives_as_it_was_in_any_column_of_emit_many(given_events):
    OutboxEvent.objects.all().delete()
    assert emit_many(given_events) == len(given_events)
    assert columns() == [
        (
            event["group"],
            event["key"],
            {"text": event["text"]},
            event.get("headers", {}),
            event.get("ordering_key"),
        )
        for event in given_events
    ]


@pytest.fixture
def encoding():
    """A function that sets the client_encoding until the end of the test."""

    def set_encoding(name):
        with connection.cursor() as cursor:
            cursor.execute("select set_config('client_encoding', %s, false)", [name])

    yield set_encoding
    set_encoding("UTF8")


def emit_one_of_many(group, key, **values):
    return emit_many([{"group": group, "key": key, **values}])


@pytest.mark.parametrize("write", [emit, emit_one_of_many])
def test_a_connection_in_another_encoding_stores_what_that_has_and_refuses_the_rest(encoding, write):
    encoding("LATIN1")
    write("ä", 'ä"\\', ordering_key="ä", n="€")  # JSON is ASCII
    for texts in (["g", "€"], ["€", "key"]):
        with pytest.raises(UnicodeEncodeError, match="u20ac"):
            write(*texts)
    encoding("UTF8")
    assert columns() == [("ä", 'ä"\\', {"n": "€"}, {}, "ä")]


@pytest.mark.parametrize("write", [emit, emit_one_of_many])
def test_a_backslash_that_is_half_of_a_letter_is_not_escaped(encoding, write):
    """In Shift JIS the second byte of some letters is that of a backslash."""
    encoding("SJIS")
    write("ソ", "表", ordering_key="ソ\\")
    encoding("UTF8")
    assert columns() == [("ソ", "表", {}, {}, "ソ\\")]
