"""What the system checks say about code that does not fit what is stored."""

import datetime as dt

import pytest
from django.db import connection, transaction

from spark_outbox import checks, emit, emit_many
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.operating import fitting
from spark_outbox.registry.handlers import registry
from tests.operating.test_bounds import CROWD
from tests.tools import connect, make_challenge

pytestmark = pytest.mark.django_db(transaction=True)

LONG_AGO = dt.datetime.now(dt.UTC) - dt.timedelta(days=15)


@pytest.fixture(autouse=True)
def handlers(own_registry):
    """Handlers named `a` and `b`, which match these groups."""
    for name in ("a", "b"):
        own_registry.add_handler(lambda event: None, group=f"^{name}$", name=name)


def found():
    """Return what the checks of the database find, by id."""
    messages = checks.check_databases(databases=["default"])
    return {message.id.partition(".")[2]: message.msg for message in messages}


def ended(group, status="done", *, key=None, at=None, since=None):
    emit(group, key or f"{group} {status}")
    event = OutboxEvent.objects.order_by("id").last()
    times = {"finished_at": at or dt.datetime.now(dt.UTC), "created_at": since or event.created_at}
    OutboxEvent.objects.filter(id=event.id).update(status=status, **times)


# Before a deployment


def test_an_empty_outbox_fits_all_code():
    assert found() == {}


def test_pending_events_that_no_handler_matches_are_found():
    emit("a", "fits")
    emit("c", "ready")
    emit("c", "delayed", delay=60)
    emit("c", "ordered", ordering_key="o")
    emit("d", "ordered later", ordering_key="o", delay=60)
    problems = found()
    assert list(problems) == ["W004"]
    assert "c (3, as 'ready'), d (1, as 'ordered later')." in problems["W004"]


def test_code_without_handlers_only_emits():
    registry.clear()
    emit("c", "key")
    ended("c")
    assert found() == {}


def test_ten_are_named_and_the_rest_is_counted():
    emit_many({"group": f"group {number:02}", "key": f"{number}"} for number in range(25))
    message = found()["W004"]
    assert message.count("(1, as") == 10
    assert "group 09 (1, as '9'), and 15 more." in message


@pytest.mark.parametrize(
    "payload",
    [
        {"order": {"$": ["model", "shop.order", 1, "default"]}},
        {"order": {"$": ["model", "challenges.challenge", 1, "no such database"]}},
        {"order": {"$": ["model", "challenges.challenge", "no key", "default"]}},
        {"order": [{"$": ["no such tag", 1]}]},
        [],
    ],
)
@pytest.mark.parametrize("column", ["payload", "headers"])
def test_pending_events_that_this_code_can_not_decode_are_found(payload, column):
    emit("a", "fits", challenge=make_challenge(), when=dt.date(2026, 1, 1))
    emit("a", "bad")
    OutboxEvent.objects.filter(key="bad").update(**{column: payload})
    assert found() == {
        "W005": "Database 'default' has pending events that this code can't decode, of the groups "
        "a (1, as 'bad').",
    }


def test_an_instance_that_is_gone_is_the_handler_s_affair_and_is_not_fetched():
    challenge = make_challenge()
    emit("a", "key", challenge=challenge)
    challenge.delete()
    seen = []
    with connection.execute_wrapper(lambda run, sql, *rest: seen.append(sql) or run(sql, *rest)):
        assert found() == {}
    assert not [sql for sql in seen if "challenges_challenge" in sql]


def test_a_large_document_is_not_read():
    emit("a", "key", text="".join(map(chr, range(300, 9000))), n=1)
    OutboxEvent.objects.update(payload=[OutboxEvent.objects.get().payload])
    assert found() == {}


def test_what_is_owed_to_a_handler_that_is_not_there_is_found():
    for key, handler, status in (
        ("one", "renamed", "pending"),
        ("two", "renamed", "pending"),
        ("three", "a", "pending"),
        ("four", "done", "done"),
        ("five", "*", "pending"),
    ):
        event = emit("a", key, delay=60)
        Delivery.objects.create(event_id=event.id, handler=handler, status=status)
    problems = found()
    assert list(problems) == ["W006"]
    assert "renamed (2, as 'one')." in problems["W006"]


# Hints


@pytest.mark.parametrize("status", ["done", "discarded", "failed", "unhandled"])
def test_handlers_that_match_no_stored_group_are_hinted_at(status):
    ended("a", status, since=LONG_AGO)
    ended("b", status, at=LONG_AGO)
    problems = found()
    assert list(problems) == ["I001"]
    assert problems["I001"].endswith(": b.")
    emit("b", "pending")
    assert found() == {}


def test_an_outbox_that_is_new_or_has_rested_is_no_proof_against_a_handler():
    ended("a")
    assert found() == {}
    OutboxEvent.objects.update(created_at=LONG_AGO, finished_at=LONG_AGO)
    assert found() == {}


def test_where_done_events_are_soon_pruned_nothing_is_said_about_handlers(settings):
    ended("a", since=LONG_AGO)
    assert list(found()) == ["I001"]
    for pruned in ({"done": 3600}, {"groups": {"^ping$": 3600}}):
        settings.SPARK_OUTBOX = {"RETENTION": pruned}
        assert found() == {}
    settings.SPARK_OUTBOX = {"RETENTION": None}
    assert list(found()) == ["I001"]


@pytest.mark.parametrize("status", ["done", "discarded", "failed", "unhandled"])
def test_stored_groups_that_no_handler_matches_are_hinted_at(status):
    ended("c", status)
    ended("d", status, at=LONG_AGO)
    ended("e", "running")
    problems = found()
    assert list(problems) == ["I002"]
    assert problems["I002"].endswith(": c.")
    emit("c", "pending")
    assert list(found()) == ["W004"]  # it is said once


# Promise 18


@pytest.fixture
def crowd():
    with connect() as session:
        for statement in (*CROWD, "vacuum analyze spark_outbox_event, spark_outbox_delivery"):
            session.execute(statement)
        session.execute(
            "insert into spark_outbox_delivery (event_id, handler) "
            "select id, 'gone' from spark_outbox_event where status = 'pending'"
        )
        yield
        session.execute("truncate spark_outbox_event cascade")


def rows_read():
    with connection.cursor() as cursor:
        cursor.execute(
            "select sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) from pg_stat_xact_user_tables "
            "where relname like 'spark_outbox%'"
        )
        return int(cursor.fetchone()[0])


def test_the_checks_read_a_bounded_number_of_rows(crowd):
    with transaction.atomic():
        problems = fitting.misfits(registry, using="default")
        groups, kinds = 20 + 3, 4 * 1000
        assert rows_read() < 3 * kinds + 4 * groups
    assert problems.unmatched == [("group 1", 4000, problems.unmatched[0].key)]
    assert problems.owed == [("gone", 4000, problems.owed[0].key)]
    assert len(problems.strange) == 19


def test_a_check_takes_few_statements(django_assert_max_num_queries):
    emit("a", "key")
    with django_assert_max_num_queries(20):
        assert found() == {}
