"""The payload: a typed and total round trip, references to model instances, and what is refused."""

import datetime as dt
import enum
import json
import uuid
from decimal import Decimal
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from django.contrib.auth.models import User
from django.db import connection, models
from django.utils.functional import SimpleLazyObject, lazystr
from django.utils.safestring import mark_safe
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spark_outbox import Event, emit, emit_many
from spark_outbox.errors import InstanceGone, UnreadablePayload, UnstorableValue
from spark_outbox.events.decoding import MAX_STORED, LazyPayload
from spark_outbox.events.encoding import MAX_DEPTH, MAX_TEXT, dump
from spark_outbox.events.references import References
from spark_outbox.models import OutboxEvent
from spark_outbox.testing import drain, emitted
from tests.challenges.models import Challenge, Donation
from tests.tools import make_challenge

pytestmark = pytest.mark.django_db


def through_jsonb(values):
    """Store and read as the outbox does: by way of jsonb, which reorders and renumbers."""
    with connection.cursor() as cursor:
        cursor.execute("select (%s::jsonb)::text", [dump(values)])
        return dict(LazyPayload(cursor.fetchone()[0], References()))


def same(one, other):
    """Compare with types: 1 is not True, 1.0 is not 1, and a tuple is not a list."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            any(same(key, k) and same(one[key], other[k]) for k in other) for key in one
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, set | frozenset):
        return len(one) == len(other) and all(any(same(a, b) for b in other) for a in one)
    if isinstance(one, dt.datetime):  # fields apart: in a gap of its zone nothing equals anything
        naive = [moment.replace(tzinfo=None) for moment in (one, other)]
        return naive[0] == naive[1] and one.fold == other.fold and same_zone(one, other)
    return repr(one) == repr(other)


def same_zone(one, other):
    named = [isinstance(moment.tzinfo, ZoneInfo) and moment.tzinfo.key for moment in (one, other)]
    return named[0] == named[1] and one.utcoffset() == other.utcoffset()


text = st.text(st.characters(codec=None)) | st.sampled_from(["$", "\0", "\ud800", "dict", "model"])
# In whole seconds: Python's own fromisoformat() loses an offset of mere microseconds.
offsets = st.none() | st.integers(-86_000, 86_000).map(
    lambda seconds: dt.timezone(dt.timedelta(seconds=seconds))
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
    | st.binary()
    | st.uuids()
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.times(timezones=offsets)
    | st.timedeltas()
    | st.datetimes(timezones=offsets)
    | st.datetimes(timezones=st.timezone_keys(allow_prefix=False).map(ZoneInfo))
)
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2).map(tuple), max_leaves=2)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
    ),
    max_leaves=12,
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(value=values)
@example(value={"$": ["model", "auth.user", 1, "default"]})
@example(value={"$": ["dict", []]})
@example(value=[-0.0, 1e22, 5e-324, 1.0, 10**30, -(2**4000)])
@example(value={1: "int", "1": "str", None: "none", True: "not reached"})
@example(value={"group": 1, "key": {"\0": "$"}})
def test_every_value_comes_back_as_it_was(value):
    assert same(through_jsonb({"value": value})["value"], value)


@given(st.dictionaries(text, values, max_size=3))
def test_json_is_ascii_in_one_line(value):
    """So emit_many() can send it one a line, in any encoding."""
    document = dump({"value": value})
    assert document.isascii()
    assert document.isprintable()


class Colour(models.TextChoices):
    RED = "red"


class Size(enum.Enum):
    SMALL = (1, Decimal("2.5"))


class Level(enum.IntEnum):
    HIGH = 3


def test_enums_are_stored_as_their_values_and_lazy_text_as_text():
    stored = through_jsonb(
        {"a": Colour.RED, "b": Size.SMALL, "c": Level.HIGH, "d": lazystr("läzy"), "e": mark_safe("<b>")}
    )
    assert stored == {"a": "red", "b": (1, Decimal("2.5")), "c": 3, "d": "läzy", "e": "<b>"}
    assert {type(value) for value in stored.values()} == {str, tuple, int}


def test_a_translation_is_stored_in_the_language_of_the_emitter():
    from django.utils import translation
    from django.utils.translation import gettext_lazy

    with translation.override("de"):
        assert through_jsonb({"day": gettext_lazy("Monday")}) == {"day": "Montag"}


ZURICH = ZoneInfo("Europe/Zurich")


@pytest.mark.parametrize(
    "moment",
    [
        dt.datetime(2026, 7, 1, 12, tzinfo=ZURICH),
        dt.datetime(2026, 10, 25, 2, 30, tzinfo=ZURICH),
        dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZURICH),
        dt.datetime(2026, 3, 29, 2, 30, tzinfo=ZURICH),  # which no clock shows
        dt.datetime.max.replace(tzinfo=ZURICH),
        dt.datetime(2026, 1, 1, tzinfo=ZoneInfo("UTC")),
        dt.time(12, 30, fold=1, tzinfo=ZoneInfo("UTC")),
    ],
)
def test_a_named_zone_comes_back(moment):
    found = through_jsonb({"a": moment})["a"]
    assert found.tzinfo is moment.tzinfo
    assert repr(found) == repr(moment)
    assert found.utcoffset() == moment.utcoffset()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # The rules of the zone have changed since: the moment stands.
        (["2026-07-01T12:00:00+05:00", 0, "Europe/Zurich"], "2026-07-01T09:00:00+02:00"),
        # A zone that this machine does not know.
        (["2026-07-01T12:00:00+05:00", 0, "Europe/Atlantis"], "2026-07-01T12:00:00+05:00"),
        (["2026-07-01T12:00:00+05:00", 1, "../../../etc/passwd"], "2026-07-01T12:00:00+05:00"),
        (["2026-07-01T12:00:00+05:00", 1], "2026-07-01T12:00:00+05:00"),
    ],
)
def test_whatever_the_zone_a_moment_stays_the_same(content, expected):
    value = LazyPayload(json.dumps({"a": {"$": ["datetime", *content]}}), References())["a"]
    assert value.isoformat() == expected


@pytest.mark.parametrize("value", [bytearray(b"x"), memoryview(b"x"), memoryview(b"xyz")[::3]])
def test_other_byte_strings_come_back_as_bytes(value):
    assert through_jsonb({"value": value}) == {"value": b"x"}


# What is refused


def nested(depth):
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "path", "cure"),
    [
        ([0, 1, 2, float("nan")], r'payload\["a"\]\[3\] is nan', "None or text"),
        ({"b": float("inf")}, r'payload\["a"\]\["b"\] is inf', "None or text"),
        ([len], r'payload\["a"\]\[0\] is callable', "Call it"),
        (Challenge, r'payload\["a"\] is callable', "Call it"),
        ((SimpleNamespace(),), r'payload\["a"\]\[0\] is a types.SimpleNamespace', "plain values"),
        ({5: object()}, r'payload\["a"\]\[5\] is a builtins.object', "plain values"),
        (Challenge.objects.all(), r'payload\["a"\] is a queryset', "list of instances"),
        (Challenge.objects, r'payload\["a"\] is a queryset', "list of instances"),
        (Challenge(), r'payload\["a"\] is an unsaved challenges.Challenge', r"save\(\)"),
        (Challenge(pk=5), r'payload\["a"\] is an unsaved challenges.Challenge', r"save\(\)"),
        ([10**5000], r'payload\["a"\]\[0\] is too large', "text or bytes"),
        (nested(MAX_DEPTH), "levels deep", "identifier"),
        ("x" * MAX_TEXT, "characters of JSON; the most is 5,242,880", "emit a key"),
    ],
)
def test_a_value_that_cannot_be_stored_is_refused_with_its_path_and_the_cure(value, path, cure):
    with pytest.raises(UnstorableValue, match=path) as caught:
        emit("group", "key", a=value)
    assert caught.match(cure)
    assert not OutboxEvent.objects.exists()


@pytest.mark.parametrize("options", [{"x": object()}, {"headers": {"x": object()}}])
def test_an_event_can_be_checked_before_it_is_emitted(options):
    Event("g", x=5, headers={"y": 5}).check()
    with pytest.raises(UnstorableValue, match=r'\["x"\] is a builtins.object'):
        Event("g", **options).check()


def test_a_payload_that_contains_itself_is_refused():
    value: list = []
    value.append(value)
    with pytest.raises(UnstorableValue, match="contains itself"):
        emit("group", "key", a=value)


def test_the_deepest_payload_that_can_be_written_can_be_read():
    value = nested(MAX_DEPTH - 2)
    assert through_jsonb({"a": value}) == {"a": value}


def test_the_largest_payload_that_can_be_written_can_be_read():
    """Small numbers in a list are what takes most room in jsonb, compared to its text."""
    text = dump({"a": [0] * ((MAX_TEXT - len('{"a":[]}')) // 2)})
    assert MAX_TEXT - 2 <= len(text) <= MAX_TEXT
    with connection.cursor() as cursor:
        cursor.execute("select pg_column_size(array[%s::jsonb])", [text])
        assert cursor.fetchone()[0] <= MAX_STORED


# References to model instances


def test_an_instance_is_stored_as_a_reference_and_arrives_freshly_fetched(own_registry):
    seen = []
    own_registry.add_handler(lambda event: seen.append(event["challenge"]), group="g", name="h")
    challenge = make_challenge()
    emit("g", "key", challenge=challenge)
    Challenge.objects.update(title="Renamed")

    drain()
    assert OutboxEvent.objects.get().payload == {
        "challenge": {"$": ["model", "challenges.challenge", challenge.pk, "default"]}
    }
    assert seen == [challenge]
    assert seen[0].title == "Renamed"


def test_a_lazy_user_such_as_request_user_is_a_reference_too():
    user = User.objects.create(username="anna")
    emit("g", "key", user=SimpleLazyObject(lambda: user))
    assert emitted()[0]["user"] == user


@pytest.mark.usefixtures("unhurried")
def test_a_batch_fetches_its_instances_with_one_query_a_model(own_registry, django_assert_num_queries):
    user = User.objects.create(username="anna")
    for number in range(20):
        challenge = make_challenge(f"{number}")
        emit("g", f"{number}", pair=[challenge, {"user": user}], again=challenge)
    titles = []

    def read(event):
        titles.append(event["again"].title)
        assert event["pair"][1]["user"].username == "anna"

    own_registry.add_handler(read, group="g")
    with connection.execute_wrapper(counting := Counting()):
        drain()
    assert titles == [f"{number}" for number in range(20)]
    # Claims grow from 16 events: two batches.
    assert counting.of("challenges_challenge") == counting.of("auth_user") == 2


class Counting:
    def __init__(self):
        self.statements = []

    def __call__(self, execute, sql, params, many, context):
        self.statements.append(sql)
        return execute(sql, params, many, context)

    def of(self, table):
        return sum(f'FROM "{table}"' in sql for sql in self.statements)


def test_each_event_gets_an_instance_of_its_own(own_registry):
    challenge = make_challenge()
    emit_many({"group": "g", "key": f"{n}", "challenge": challenge} for n in range(3))
    seen = []

    def spoil(event):
        seen.append(event["challenge"].title)
        event["challenge"].title = "spoilt"

    own_registry.add_handler(spoil, group="g")
    drain()
    assert seen == ["One"] * 3


def test_what_a_handler_wrote_is_seen_by_the_next_of_the_batch(own_registry):
    challenge = make_challenge("0")
    emit_many({"group": "g", "key": f"{n}", "challenge": challenge} for n in range(5))

    def count_up(event):
        challenge = event["challenge"]
        challenge.title = f"{int(challenge.title) + 1}"
        challenge.save()

    own_registry.add_handler(count_up, group="g")
    drain()
    challenge.refresh_from_db()
    assert challenge.title == "5"


def test_what_a_failed_handler_wrote_is_not_seen_by_the_next(own_registry):
    challenge = make_challenge("before")
    emit_many({"group": "g", "key": f"{n}", "challenge": challenge} for n in range(2))
    seen = []

    def write_and_fail(event):
        Challenge.objects.update(title="never")
        seen.append(event["challenge"].title)
        raise RuntimeError

    own_registry.add_handler(write_and_fail, group="g")
    own_registry.add_handler(lambda event: seen.append(event["challenge"].title), group="g", name="b")
    drain(raise_exceptions=False)
    assert seen == ["never", "before"] * 2


def test_a_row_that_is_gone_fails_its_delivery_and_no_other(own_registry):
    challenge, gone = make_challenge(), make_challenge("gone")
    emit("g", "gone", challenge=gone)
    emit("g", "fine", challenge=challenge)
    pk = gone.pk
    gone.delete()

    own_registry.add_handler(lambda event: event["challenge"], group="g", name="h")
    with pytest.raises(InstanceGone, match=rf"challenges\.Challenge {pk} .* is gone"):
        drain()
    assert OutboxEvent.objects.get(key="fine").status == "done"
    failed = OutboxEvent.objects.get(key="gone")
    assert (failed.status, failed.attempts) == ("failed", 1)  # it will not come back
    assert "InstanceGone" in failed.last_error


def test_a_kept_event_can_still_be_read_after_its_batch(own_registry):
    kept = []
    own_registry.add_handler(kept.append, group="g", name="h")
    challenge = make_challenge()
    emit("g", "key", challenge=challenge)
    drain()
    assert kept[0]["challenge"] == challenge


def test_decimal_and_uuid_keys_are_references_too(own_registry):
    donation = Donation.objects.create(challenge=make_challenge(), amount="1.5")
    emit("g", "key", donations=[donation, donation.challenge], id=uuid.UUID(int=1))
    (event,) = emitted("g")
    assert event["donations"] == [donation, donation.challenge]
    assert event["id"] == uuid.UUID(int=1)


# Rows that somebody else wrote


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("[1]", "must be an object"),
        ("null", "must be an object"),
        ('{"a": {"$": ["no such tag", 1]}}', "no such tag"),
        ('{"a": {"$": []}}', "can't be read"),
        ('{"a": {"$": 5}}', "can't be read"),
        ('{"a": {"$": ["datetime", "yesterday"]}}', "yesterday"),
        ('{"a": {"$": ["dict", [[[], 1]]]}}', "can't be read"),
        ('{"a": {"$": ["model", "no.model", 1, "default"]}}', "not installed"),
        ('{"a": {"$": ["model", "os", 1, "default"]}}', "not installed"),
        ('{"a": {"$": ["model", ["x"], 1, "default"]}}', "not installed"),
        ('{"a": {"$": ["model", "challenges.challenge", "x", "default"]}}', "no key"),
        ('{"a": {"$": ["model", "challenges.challenge", [], "default"]}}', "can't be read|no key"),
        ('{"a": {"$": ["model", "challenges.challenge", 1, "elsewhere"]}}', "elsewhere"),
    ],
)
def test_an_unreadable_payload_is_a_clear_error_in_the_handlers_delivery(own_registry, payload, message):
    with connection.cursor() as cursor:
        cursor.execute(
            "insert into spark_outbox_event (key, event_group, payload) values ('k', 'g', %s)", [payload]
        )
    own_registry.add_handler(lambda event: event["a"], group="g", name="h")
    with pytest.raises(UnreadablePayload, match=message):
        drain()
    assert OutboxEvent.objects.get().status == "failed"
