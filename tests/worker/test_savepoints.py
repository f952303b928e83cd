"""Savepoints: each handler's writes have one, and only those that write."""

import contextlib
import itertools
import math
import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from django.db import DatabaseError, connection

from spark_outbox import emit, emit_many
from spark_outbox.errors import HandlerTimeout
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.registry.policy import Policy
from spark_outbox.worker import session_settings
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.savepoints import MAX_SUBTRANSACTIONS, Savepoints
from tests.challenges.models import Handled
from tests.statements import Statements
from tests.tools import HOUR, deliveries, handled, note, statuses, wait_until_done, worker_thread

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.usefixtures("unhurried")
def test_a_savepoint_goes_with_the_first_statement_and_is_released_with_the_next(own_registry):
    own_registry.add_handler(
        lambda event: note(event) if event.key in "135" else None, group="", name="h"
    )
    emit_many({"group": "g", "key": f"{n}"} for n in range(8))
    worker = Worker()
    with Statements() as statements:
        worker.handle_batch()
    queries = [sql.partition("; INSERT")[0] for sql in statements.sql if "savepoint" in sql]
    assert queries == [
        "savepoint spark_outbox_1",
        "release savepoint spark_outbox_1; savepoint spark_outbox_2",
        "release savepoint spark_outbox_2; savepoint spark_outbox_1",
    ]


def test_the_first_statement_of_a_handler_is_sent_in_few_texts(own_registry):
    """Psycopg parses each text that is not among the last 128: for a long INSERT that takes a while."""
    own_registry.add_handler(note, group="")
    emit_many({"group": "g", "key": f"{n}"} for n in range(40))
    with Statements() as statements:
        Worker(commit_interval=HOUR).drain()
    assert len({sql for sql in statements.sql if "; INSERT" in sql}) <= 3


def no_sql(event):
    with connection.cursor() as cursor:
        cursor.execute("this is no SQL")


def too_few_parameters(event):
    with connection.cursor() as cursor:
        cursor.execute("select %s, %s", [1])


@pytest.mark.parametrize("fail", [no_sql, too_few_parameters])
def test_a_first_statement_that_cannot_be_run_costs_others_nothing_but_a_second_call_once(
    own_registry, fail
):
    """It takes its savepoint along, and the batch. From then on that handler's savepoints go ahead."""
    calls = []

    def neighbour(event):
        calls.append(event.key)
        note(event)

    own_registry.add_handler(neighbour, group="^good", name="good")
    own_registry.add_handler(fail, group="^bad", name="bad", policy=Policy(backoff=3600))
    for key in ("good 1", "bad 1", "good 2", "bad 2", "good 3"):
        emit(key, key)
    worker = Worker(commit_interval=HOUR)
    worker.drain()
    assert calls == ["good 1", "good 1", "good 2", "good 3"]
    assert list(Handled.objects.order_by("id").values_list("key", flat=True)) == calls[1:]
    assert set(Delivery.objects.values_list("handler", "status", "attempts")) == {("bad", "pending", 1)}
    assert {"SyntaxError", "ProgrammingError"} & set(
        re.findall(r"\w+Error", Delivery.objects.all()[0].error)
    )


def test_an_alarm_that_rings_as_a_savepoint_is_taken_takes_nothing_back_of_others(
    own_registry, monkeypatch
):
    """The one before is still there by then; it is another handler's."""
    limits = []

    def ceil(number):
        limits.append(number)
        if len(limits) == 3:  # once: it is the second handler's time that is up
            raise HandlerTimeout
        return math.ceil(number)

    monkeypatch.setattr(session_settings, "math", SimpleNamespace(ceil=ceil))
    policy = Policy(timeout=60, backoff=0.01)
    own_registry.add_handler(note, group="", name="first", policy=policy)
    own_registry.add_handler(note, group="^late", name="second", policy=policy)
    emit("g", "before")
    emit("late", "late")
    with worker_thread(commit_interval=HOUR):
        wait_until_done(2)
    assert sorted(Handled.objects.values_list("key", flat=True)) == ["before", "late", "late"]
    assert deliveries() == {"first": ("done", 1), "second": ("done", 2)}


@pytest.mark.parametrize("then_fails", [False, True])
def test_a_handler_may_go_on_after_a_first_statement_that_could_not_be_sent(own_registry, then_fails):
    def go_on(event):
        with pytest.raises(Exception, match="placeholders"):
            too_few_parameters(event)
        note(event)
        if then_fails:
            raise RuntimeError

    own_registry.add_handler(note, group="^good")
    own_registry.add_handler(go_on, group="^bad", name="bad")
    for key in ("good 1", "bad", "good 2"):
        emit(key, key)
    Worker(commit_interval=HOUR).drain()
    expected = {"good 1": "done", "bad": "pending" if then_fails else "done", "good 2": "done"}
    assert statuses() == expected
    handled = set(Handled.objects.values_list("key", flat=True))
    assert handled == {key for key, status in expected.items() if status == "done"}


def swallow_what_cannot_be_sent(event):
    with contextlib.suppress(DatabaseError):
        too_few_parameters(event)


def swallow_an_alarm_just_after_the_savepoint(event):
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(HandlerTimeout):
        patch.setattr(Savepoints, "confirm", Mock(side_effect=HandlerTimeout))
        note(event)


@pytest.mark.parametrize("between", ["u", "uu", "uuu", "a", "ua", "uua"])
def test_no_handler_is_rolled_back_to_a_savepoint_of_another(own_registry, between):
    """Nobody knows whether the last savepoint was taken. So its number is not free, nor the one before:
    a handler whose own was not taken must find none to roll back to."""
    functions = {
        "good": note,
        "u": swallow_what_cannot_be_sent,
        "a": swallow_an_alarm_just_after_the_savepoint,
        "bad": no_sql,
    }
    for name, function in functions.items():
        own_registry.add_handler(function, group=f"^{name}$", name=name, policy=Policy(backoff=3600))
    for place, group in enumerate(["good", "good", *between, "bad", "good"]):
        emit(group, f"{group} {place}")
    Worker(commit_interval=HOUR).drain()
    done = [key for key, status in statuses().items() if status == "done"]
    assert {"good 0", "good 1"} <= set(done)
    assert not any(key.startswith("bad") for key in done)
    assert handled() == [key for key in done if not key.startswith("u")]


def several_statements(event):
    with connection.cursor() as cursor:
        cursor.execute("select 1; select 2")
        assert cursor.fetchall() == [(1,)]
        assert cursor.nextset()
        assert cursor.fetchall() == [(2,)]


def a_server_side_cursor(event):
    assert [row.key for row in OutboxEvent.objects.order_by("id").iterator()] == ["1", "2"]


def many_at_once(event):
    with connection.cursor() as cursor:
        cursor.executemany("select %s", [[1], [2]])


def a_percent_sign(event):
    with connection.cursor() as cursor:
        cursor.execute("select '100 %'")
        assert cursor.fetchone() == ("100 %",)


@pytest.mark.parametrize(
    "first", [several_statements, a_server_side_cursor, many_at_once, a_percent_sign]
)
@pytest.mark.parametrize("fails", [False, True])
def test_whatever_a_handler_starts_with_it_is_isolated(own_registry, first, fails):
    def start(event):
        first(event)
        note(event)
        if fails:
            raise RuntimeError

    own_registry.add_handler(note, group="", name="other")
    own_registry.add_handler(start, group="", name="first")
    for key in "12":
        emit("g", key)
    Worker(commit_interval=HOUR).drain()
    assert set(statuses().values()) == {"pending" if fails else "done"}
    assert Handled.objects.count() == (2 if fails else 4)


def test_a_batch_ends_before_its_savepoints_overflow_the_servers_cache(own_registry):
    own_registry.add_handler(note, group="")
    emit_many({"group": "g", "key": f"{n:03}"} for n in range(200))
    worker = Worker(commit_interval=HOUR)
    sizes = list(itertools.takewhile(bool, (worker.handle_batch() for _ in range(50))))
    assert sum(sizes) == 200
    assert max(sizes) == MAX_SUBTRANSACTIONS


def test_handlers_that_only_read_do_not_end_a_batch(own_registry):
    own_registry.add_handler(lambda event: Handled.objects.count(), group="", name="read")
    emit_many({"group": "g", "key": f"{n}"} for n in range(200))
    worker = Worker(commit_interval=HOUR)
    worker._claims.size.fitting = 200
    assert worker.handle_batch() == 200
