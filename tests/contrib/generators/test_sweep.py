"""Generators: events that people define in the admin."""

import datetime as dt
import io
import math
from decimal import Decimal

import pytest
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command
from django.db import IntegrityError, connection, connections, transaction
from django.utils import timezone, translation
from django.utils.functional import lazy

from spark_outbox import handler
from spark_outbox.contrib.generators.checks import check_generators
from spark_outbox.contrib.generators.conditions import holds, parse, to_text
from spark_outbox.contrib.generators.models import Condition, Generator
from spark_outbox.contrib.generators.sources import events_of
from spark_outbox.errors import RegistrationError
from spark_outbox.models import OutboxEvent
from spark_outbox.testing import drain, emitted
from tests.challenges.models import Challenge
from tests.tools import make_challenge

LABEL = "spark_outbox_generators.Generator"


def challenges(*titles):
    """Make challenges whose own source has emitted nothing."""
    made = [make_challenge(title) for title in titles]
    OutboxEvent.objects.all().delete()
    return made


def sweep(*options):
    out, err = io.StringIO(), io.StringIO()
    try:
        call_command("process_spark_sources", LABEL, *options, stdout=out, stderr=err)
    except CommandError as error:
        return out.getvalue(), err.getvalue(), error.returncode
    return out.getvalue(), err.getvalue(), 0


def keys():
    return sorted(OutboxEvent.objects.values_list("key", flat=True))


# The sweep


@pytest.mark.django_db
def test_a_candidate_that_meets_all_conditions_has_one_event_ever(register, generate):
    register()
    a, bb, ccc = challenges("a", "bb", "ccc")
    generate("long", ("length", ">", "1"), ("title", "!=", "ccc"))
    assert sweep() == (f"{LABEL}: 1 instances, 1 events, 1 new\n", "", 0)
    (event,) = emitted()
    assert (event.group, event.key) == ("long", f"long_{bb.pk}")
    assert event["context"] == {"challenge": bb, "length": 2, "title": "bb"}
    assert sweep() == (f"{LABEL}: 1 instances, 1 events, 0 new\n", "", 0)
    Condition.objects.all().delete()
    sweep()  # whatever becomes of its conditions
    assert keys() == sorted(f"long_{each.pk}" for each in (a, bb, ccc))


@pytest.mark.django_db
def test_a_handler_gets_the_context(own_registry, register, generate):
    register()
    (challenge,) = challenges("a")
    own_registry.add_source(events_of, model=Generator, on_save=False)
    generate("greet")
    seen = []

    @handler("^greet$")
    def greet(event):
        seen.append(event["context"]["challenge"])

    sweep()
    drain()
    assert seen == [challenge]


@pytest.mark.django_db
def test_nothing_is_emitted_before_the_sweep_or_of_an_inactive_generator(register, generate):
    register()
    challenges("a")
    generate("on").save()
    generate("off", is_active=False)
    assert keys() == []
    sweep()
    assert set(OutboxEvent.objects.values_list("group", flat=True)) == {"on"}


@pytest.mark.django_db
def test_generators_of_one_group_share_its_keys(register, generate):
    register()
    one, _, three = challenges("a", "bb", "ccc")
    generate("odd", ("length", "=", "1"))
    generate("odd", ("length", "=", "3"))
    generate("odd", ("title", "=", "a"))
    assert sweep()[0] == f"{LABEL}: 3 instances, 3 events, 2 new\n"
    assert keys() == sorted([f"odd_{one.pk}", f"odd_{three.pk}"])


@pytest.mark.django_db
def test_a_first_sweep_as_done_leaves_the_old_ones_unhandled(register, generate):
    register()
    challenges("a", "bb")
    generate()
    assert "2 events, 2 new, as done" in sweep("--as-done")[0]
    assert set(OutboxEvent.objects.values_list("status", flat=True)) == {"done"}


@pytest.mark.django_db(transaction=True)
def test_candidates_are_streamed_and_written_in_chunks(register, generate):
    register(candidates=lambda: iter(range(25)), context=note_open, variables={}, key=str)
    generate("numbers")
    assert sweep("--chunk-size", "10")[0] == f"{LABEL}: 1 instances, 25 events, 25 new\n"
    assert NOTED[:25] == [(0, False)] * 10 + [(10, False)] * 10 + [(20, False)] * 5
    NOTED.clear()


NOTED = []


def note_open(number):
    NOTED.append((OutboxEvent.objects.count(), connection.in_atomic_block))
    return {"number": number}


@pytest.mark.django_db(transaction=True)
def test_a_queryset_is_streamed_by_a_cursor_that_holds_no_snapshot(register, generate):
    def context(challenge):
        with connection.cursor() as cursor:
            cursor.execute("select is_holdable from pg_cursors where statement ~ 'challenges_challenge'")
            cursors.extend(cursor.fetchall())
        return {}

    cursors = []
    register(context=context, variables={})
    challenges("a", "b")
    generate()
    assert sweep("--chunk-size", "1") == (f"{LABEL}: 1 instances, 2 events, 2 new\n", "", 0)
    assert cursors == [(True,), (True,)]


@pytest.mark.django_db
def test_candidates_can_be_anything_that_has_a_key(register, generate):
    register(
        "numbers",
        candidates=lambda: [1, 2, 3],
        context=lambda n: {"n": n},
        variables={"n": int},
        key=str,
    )
    generate("even", ("n", "=", "2"), source="numbers")
    sweep()
    assert keys() == ["even_2"]


@pytest.mark.django_db
def test_candidates_that_come_twice_have_one_event(register, generate):
    register(candidates=lambda: [*Challenge.objects.all()] * 2)
    challenges("a", "b")
    generate()
    assert sweep() == (f"{LABEL}: 1 instances, 4 events, 2 new\n", "", 0)


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_events_are_emitted_where_the_generators_are(register, generate):
    using = []
    register(candidates=lambda: using.append(OutboxEvent.objects.count()) or Challenge.objects.all())
    challenges("a")
    generate("g", ("length", "=", "1"))
    with connections["other"].execute_wrapper(
        lambda go, sql, *rest: using.append(sql) or go(sql, *rest)
    ):
        assert sweep("--database", "other")[0] == f"{LABEL}: 1 instances, 1 events, 1 new\n"
    assert any("spark_outbox_emit_many" in str(sql) for sql in using)
    assert any("LEFT OUTER JOIN" in str(sql) for sql in using)


# What is wrong costs its generator alone


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variable": "gone"}, "gone > 1: The source has no such variable."),
        ({"value": "many"}, "length > many: Enter a whole number."),
        ({"variable": "flag"}, "This variable can only be compared by = and !=."),
        ({"variable": "lost"}, "candidates failed, the first with The context has no “lost”."),
        ({"variable": "sum"}, "“sum” can't be compared: its type is float, not Decimal."),
    ],
)
def test_a_condition_that_makes_no_sense_costs_its_generator_alone(change, message, register, generate):
    variables = {"length": int, "title": str, "flag": bool, "lost": int, "sum": Decimal}
    register(variables=variables, context=lambda each: {"length": len(each.title), "sum": 1.5})
    challenges("a", "bb")
    bad = generate("bad", ("length", ">", "1"))
    Condition.objects.update(**change)
    generate("good", ("length", ">", "1"))
    out, err, code = sweep()
    assert (out, code) == (f"{LABEL}: 2 instances, 1 events, 1 new\n", 1)
    assert err.startswith(f"{LABEL} {bad.pk}: ")
    assert message in err
    assert set(OutboxEvent.objects.values_list("group", flat=True)) == {"good"}


@pytest.mark.django_db
def test_a_source_that_is_gone_costs_its_generators_alone(register, generate):
    register()
    challenges("a")
    generate("bad", source="gone")
    generate("good")
    _, err, code = sweep()
    assert "SourceError: bad: The source “gone” is not registered." in err
    assert code == 1
    assert set(OutboxEvent.objects.values_list("group", flat=True)) == {"good"}


@pytest.mark.django_db
def test_a_candidate_that_fails_is_passed_over_and_reported(register, generate):
    def fragile(challenge):
        return {"length": 10 // len(challenge.title), "title": "secret"}

    register(context=fragile)
    challenges("a", "", "bb", "")
    generate()
    out, err, code = sweep("--chunk-size", "1")
    assert (out, code) == (f"{LABEL}: 1 instances, 2 events, 2 new\n", 1)
    assert "long: 2 candidates failed, the first with ZeroDivisionError at " in err
    assert "secret" not in err


@pytest.mark.django_db
def test_a_key_that_is_too_long_costs_its_candidate_alone(register, generate):
    register(key=lambda challenge: challenge.title * 100)
    challenges("abc", "de")
    generate("g")
    _, err, code = sweep()
    assert (code, keys()) == (1, ["g_" + "de" * 100])
    assert "1 candidates failed" in err


@pytest.mark.django_db
@pytest.mark.parametrize("key", [None, ""])
def test_a_candidate_without_a_key_fails_as_others_could_have_none_either(key, register, generate):
    register(key=lambda challenge: key if challenge.title == "a" else challenge.pk)
    _, b = challenges("a", "b")
    generate("g")
    _, err, code = sweep()
    assert "1 candidates failed, the first with It has no key." in err
    assert (code, keys()) == (1, [f"g_{b.pk}"])


@pytest.mark.django_db
def test_candidates_that_can_not_be_read_cost_their_generator_alone(register, generate):
    register(candidates=lambda: 1 / 0)
    register("others")
    challenges("a")
    generate("bad")
    generate("good", source="others")
    _, err, code = sweep()
    assert "raised ZeroDivisionError at " in err
    assert (code, len(keys())) == (1, 1)


@pytest.mark.django_db
def test_a_value_that_can_not_be_stored_costs_its_candidate_alone(register, generate):
    odd = {"a": object(), "b": lazy(lambda: 1 / 0, str)()}
    register(context=lambda each: {"x": odd.get(each.title)}, variables={})
    *_, c = challenges("a", "b", "c")
    generate()
    _, err, code = sweep()
    assert err.count("\n") == 1
    assert '2 candidates failed, the first with payload["context"]["x"] is a builtins.object' in err
    assert (code, keys()) == (1, [f"long_{c.pk}"])


# Edits


@pytest.mark.django_db(transaction=True)
def test_an_edit_during_a_sweep_is_seen_by_generators_that_come_later(register, generate):
    made = challenges("a", "bb")
    later = []

    def candidates():
        if not later:
            later.append(Generator.objects.get(group="second"))
            later[0].conditions.create(variable="length", operator="=", value="2")
            Generator.objects.filter(group="third").update(is_active=False)
            Generator.objects.filter(group="fourth").delete()
        return Challenge.objects.all()

    register(candidates=candidates)
    for group in ("first", "second", "third", "fourth"):
        generate(group)
    assert sweep()[2] == 0
    assert keys() == sorted([*(f"first_{each.pk}" for each in made), f"second_{made[1].pk}"])


@pytest.mark.django_db
def test_a_generator_and_its_conditions_are_read_at_once(django_assert_num_queries, register, generate):
    register(candidates=list)
    generator = generate("g", ("length", ">", "1"), ("title", "=", "a"))
    with django_assert_num_queries(2):  # the other looks for sources with the same group
        assert list(events_of(generator)) == []


# Conditions


@pytest.mark.parametrize(
    ("kind", "text", "stored"),
    [
        (int, " 5 ", "5"),
        (int, "-" + "9" * 200, "-" + "9" * 200),
        (int, "٣", "3"),
        (float, "1e400000", None),
        (float, "nan", None),
        (float, "0.5", "0.5"),
        (Decimal, "NaN", None),
        (Decimal, "Infinity", None),
        (Decimal, "1e500", None),
        (Decimal, "1e5", "1E+5"),
        (Decimal, "2.50", "2.50"),
        (int, "1.5", None),
        (int, "", None),
        (bool, "TRUE", "true"),
        (bool, "0", "false"),
        (bool, "maybe", None),
        (bool, "", None),
        (str, "", ""),
        (str, "  täg ✓ ", "täg ✓"),
        (str, "a\x00b", None),
        (dt.date, "2026-12-31", "2026-12-31"),
        (dt.date, "2026-02-30", None),
        (dt.datetime, "2026-12-31 18:00", "2026-12-31T18:00:00+00:00"),
        (dt.datetime, "2026-12-31T18:00+02:00", "2026-12-31T18:00:00+02:00"),
        (dt.datetime, "0001-01-01", "0001-01-01T00:00:00+00:00"),
        (dt.datetime, "tomorrow", None),
    ],
)
def test_a_value_is_stored_in_one_spelling_or_refused(kind, text, stored):
    if stored is None:
        with pytest.raises(ValidationError):
            parse(kind, text)
        return
    value = parse(kind, text)
    assert isinstance(value, kind)
    assert to_text(value) == stored
    for language in ("de", "en", "fr"):
        with translation.override(language):
            assert parse(kind, stored) == value


def test_dates_are_also_read_as_the_language_writes_them():
    with translation.override("de"):
        assert to_text(parse(dt.date, "31.12.2026")) == "2026-12-31"


def test_a_time_has_no_zone_without_use_tz(settings):
    settings.USE_TZ = False
    with pytest.raises(ValidationError, match="A time has a zone if, and only if"):
        parse(dt.datetime, "2026-12-31 18:00+02:00")
    assert parse(dt.datetime, "2026-12-31 18:00") == dt.datetime(2026, 12, 31, 18)


NOON = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
EAST = dt.timezone(dt.timedelta(hours=2))


@pytest.mark.parametrize(
    ("value", "operator", "wanted", "kind", "expected"),
    [
        (5, ">", 5, int, False),
        (5, ">=", 5, int, True),
        (5, "<", 6, float, True),
        (10**400, ">", 1.5, float, True),
        (Decimal("0.10"), "=", Decimal("0.1"), Decimal, True),
        (7, "<=", Decimal("7.5"), Decimal, True),
        (True, "!=", False, bool, True),
        ("b", ">", "a", str, True),
        (NOON.date(), "<", dt.date(2026, 1, 2), dt.date, True),
        (
            NOON,
            "=",
            NOON.astimezone(EAST),
            dt.datetime,
            True,
        ),
        (math.nan, "!=", 5.0, float, False),
        (Decimal("NaN"), "!=", Decimal(5), Decimal, False),
        (math.inf, ">", 1e308, float, True),
        *((None, operator, 5, int, False) for operator in (">", "<", ">=", "<=", "=", "!=")),
    ],
)
def test_values_are_compared_as_their_type(value, operator, wanted, kind, expected):
    assert holds(value, operator, wanted, kind=kind) is expected


@pytest.mark.parametrize(
    ("value", "wanted", "kind"),
    [
        (True, 1, int),
        (1, True, bool),
        ("1", 1, int),
        (1.5, 1, int),
        (Decimal(1), 1.0, float),
        (NOON, NOON.date(), dt.date),
        (NOON.date(), NOON, dt.datetime),
        (timezone.make_naive(NOON, dt.UTC), NOON, dt.datetime),
        ([], "", str),
    ],
)
def test_a_value_of_another_type_is_no_match_but_an_error(value, wanted, kind):
    with pytest.raises(TypeError):
        holds(value, "!=", wanted, kind=kind)


@pytest.mark.django_db
def test_the_table_refuses_other_operators(generate):
    with pytest.raises(IntegrityError), transaction.atomic():
        generate("g", ("length", "~", "1"))


# Definitions


async def never():
    yield


def test_a_translated_name_is_not_read_before_it_is_shown(register):
    register(verbose_name=lazy(lambda: 1 / 0, str)())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "1 to 100 characters"),
        ({"name": "n" * 101}, "1 to 100 characters"),
        ({"candidates": [1, 2]}, "The candidates of source 'x' must be a plain function"),
        ({"context": None}, "The context of source 'x' must be a plain function"),
        (
            {"variables": {"a": list}},
            "these types: int, float, Decimal, bool, str, date, datetime",
        ),
        ({"variables": {"a": [int]}}, "these types: int, float"),
        ({"candidates": never}, "The candidates of source 'x' must be a plain function"),
        ({"variables": {"v" * 101: int}}, "1 to 100 characters"),
        ({"variables": ["length"]}, "a dict of names and types"),
        ({"name": "challenges"}, "There is a source 'challenges' of generators already"),
    ],
)
def test_a_wrong_definition_is_refused(options, message, register):
    register()
    with pytest.raises(RegistrationError, match=message):
        register(options.pop("name", "x"), **options)


# The check


@pytest.mark.django_db
def test_the_system_check_finds_active_generators_that_can_not_be_evaluated(register, generate):
    register()
    generate("fine", ("length", ">", "1"))
    generate("off", ("gone", ">", "1"), is_active=False)
    assert check_generators(databases=["default"]) == []
    generate("bad", ("gone", ">", "1"), ("length", ">", "x"))
    generate("fine", source="gone")
    messages = check_generators(databases=["default"])
    assert {each.id for each in messages} == {"spark_outbox_generators.W001"}
    assert [each.msg.partition(" in database")[0] for each in messages] == [
        "The generator fine",
        "The generator bad",
        "The generator fine",
    ]
    assert (
        "gone > 1: The source has no such variable. length > x: Enter a whole number." in messages[1].msg
    )
    assert "keys could be the same" in messages[0].msg
    assert check_generators(databases=None) == []


@pytest.mark.django_db(transaction=True)
def test_the_check_is_silent_for_a_role_that_may_not_read_generators(logins, generate):
    generate("bad", source="gone")
    assert len(check_generators(databases=["default"])) == 1
    with logins.django("nobody"):
        assert check_generators(databases=["default"]) == []
