"""The worker in this process: claim, dispatch, settle; isolation, commit interval, floor."""

import gc
import itertools
import math
import re
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from django.db import IntegrityError, connection, connections, transaction
from django.utils import timezone

from spark_outbox import Retry, emit, emit_many
from spark_outbox.errors import HandlerTimeout
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.registry.handlers import Registry
from spark_outbox.registry.policy import Policy
from spark_outbox.store import checking, scanning
from spark_outbox.worker import savepoints
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.savepoints import MAX_SUBTRANSACTIONS
from tests.challenges.models import Challenge, Donation, Handled
from tests.statements import Statements
from tests.tools import (
    HOUR,
    Clock,
    connect,
    deliveries,
    eventually,
    handled,
    make_challenge,
    make_ready,
    note,
    statuses,
    wait_until_asleep,
    wait_until_done,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)

MINUTE = timedelta(minutes=1)


# The happy path


def test_events_are_handled_in_order_and_marked_done(own_registry):
    own_registry.add_handler(note, group="^g")
    emit_many({"group": "g", "key": f"{n:03}"} for n in range(100))
    assert Worker().drain() == 100
    assert list(Handled.objects.order_by("id").values_list("key", flat=True)) == [
        f"{n:03}" for n in range(100)
    ]
    event = OutboxEvent.objects.first()
    assert (event.status, event.attempts, event.last_error) == ("done", 1, "")
    assert event.finished_at >= event.created_at


def test_handlers_are_called_in_registration_order_if_their_regex_is_found_in_the_group(own_registry):
    calls = []
    for name, pattern in [("z", "paid"), ("a", "^order"), ("m", "^paid"), ("b", "order_(paid|sent)$")]:
        own_registry.add_handler(
            lambda event, name=name: calls.append((event.group, name)), group=pattern, name=name
        )
    emit("order_paid")
    emit("prepaid_order")
    Worker().drain()
    assert calls == [
        ("order_paid", "z"),
        ("order_paid", "a"),
        ("order_paid", "b"),
        ("prepaid_order", "z"),
    ]


def test_an_event_that_nobody_handles_is_unhandled_and_not_done(own_registry, caplog):
    emit("g", "key")
    assert Worker().drain() == 1
    assert statuses() == {"key": "unhandled"}
    assert "No handler matched 1 events" in caplog.text


def test_the_happy_path_is_one_insert_one_update_and_no_savepoint(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="nothing")
    with Statements() as statements:
        emit_many({"group": "g", "key": f"{n}"} for n in range(10))
        worker = Worker()
        worker.handle_batch()
    assert statements.count("insert|spark_outbox_emit_many") == 1
    assert statements.count("update spark") == 1
    assert statements.count("savepoint|delivery") == 0
    assert not Delivery.objects.exists()


def test_a_handlers_writes_and_its_done_mark_are_committed_together(own_registry):
    seen = []

    def handle(event):
        note(event)
        with connect() as other:
            seen.append(other.execute("select count(*) from challenges_handled").fetchone())

    own_registry.add_handler(handle, group="")
    emit("g", "key")
    Worker().drain()
    assert seen == [(0,)]
    assert Handled.objects.count() == 1


def test_two_workers_handle_each_of_2000_events_once(own_registry):
    handled = []
    own_registry.add_handler(
        lambda event: (note(event), handled.append(threading.current_thread())), group="", name="h"
    )
    with worker_thread(batch_size=20), worker_thread(batch_size=20):
        wait_until_asleep(2)
        emit_many(({"group": "g", "key": f"{n}"} for n in range(2000)), chunk_size=100)
        wait_until_done(2000)
    keys = list(Handled.objects.values_list("key", flat=True))
    assert sorted(keys, key=int) == [f"{n}" for n in range(2000)]
    assert len(handled) == 2000
    assert len(set(handled)) == 2  # both took part


# Handlers that fail


def test_a_failing_handler_hurts_neither_its_siblings_nor_other_events(own_registry):
    def fail(event):
        note(event)
        if event.key == "5":
            raise RuntimeError("no")

    own_registry.add_handler(lambda event: note(event), group="", name="before")
    own_registry.add_handler(fail, group="", name="fail")
    own_registry.add_handler(lambda event: note(event), group="", name="after")
    emit_many({"group": "g", "key": f"{n}"} for n in range(10))
    Worker().drain()

    assert {key for key, status in statuses().items() if status == "pending"} == {"5"}
    assert Handled.objects.filter(key="5").count() == 2
    assert Handled.objects.count() == 9 * 3 + 2
    failed = OutboxEvent.objects.get(key="5")
    assert failed.attempts == 1
    assert "RuntimeError: no" in failed.last_error
    assert failed.available_at > failed.created_at


def test_a_retry_runs_only_the_handlers_that_still_owe(own_registry):
    calls, attempts = [], []
    own_registry.add_handler(lambda event: calls.append("fine"), group="", name="fine")

    def flaky(event):
        calls.append("flaky")
        attempts.append(event.attempt)
        if event.attempt < 3:
            raise RuntimeError("not yet")

    own_registry.add_handler(flaky, group="", name="flaky")
    emit("g", "key")
    Worker().drain()
    assert {d.handler: (d.status, d.attempts) for d in Delivery.objects.all()} == {
        "fine": ("done", 1),
        "flaky": ("pending", 1),
    }
    for _ in range(2):
        assert statuses() == {"key": "pending"}
        make_ready()
        Worker().drain()
    assert calls == ["fine", "flaky", "flaky", "flaky"]
    assert attempts == [1, 2, 3]
    assert statuses() == {"key": "done"}
    assert {d.handler: (d.status, d.attempts) for d in Delivery.objects.all()} == {
        "fine": ("done", 1),
        "flaky": ("done", 3),
    }


def test_what_an_event_owes_to_a_handler_that_is_gone_is_discarded_after_an_hour(own_registry, caplog):
    def fail(event):
        raise RuntimeError

    own_registry.add_handler(fail, group="", name="old")
    emit("g", "key")
    Worker().drain()
    own_registry.clear()
    own_registry.add_handler(lambda event: None, group="", name="new")
    for minutes, status, old in ((-1, "pending", "pending"), (59, "pending", "pending")):
        Delivery.objects.filter(handler="old").update(available_at=timezone.now() - minutes * MINUTE)
        make_ready()
        assert Worker().drain() == 1  # and it is not due again at once
        assert statuses() == {"key": status}
        assert dict(Delivery.objects.values_list("handler", "status")) == {"old": old, "new": "done"}
        due_in = OutboxEvent.objects.get().available_at - timezone.now()
        assert timedelta(0) < due_in < 6 * MINUTE
    Delivery.objects.filter(handler="old").update(available_at=timezone.now() - 61 * MINUTE)
    make_ready()
    assert Worker().drain() == 1
    assert statuses() == {"key": "done"}
    assert dict(Delivery.objects.values_list("handler", "status")) == {"old": "discarded", "new": "done"}
    assert "No worker has handler old" in caplog.text


def test_in_a_rolling_deployment_an_old_worker_leaves_to_new_ones_what_only_they_can_do(own_registry):
    calls = []

    def new_in_this_release(event):
        calls.append(event.attempt)
        if event.attempt < 3:
            raise Retry(after=0.01)

    releases = {"old": Registry(), "new": Registry()}
    for registry in releases.values():
        registry.add_handler(note, group="", name="both have it")
    releases["new"].add_handler(new_in_this_release, group="", name="new")
    emit("g", "key")
    Worker(registry=releases["new"]).drain()
    for release in ("old", "new", "old", "old", "new", "old"):
        time.sleep(0.02)
        make_ready()
        Worker(registry=releases[release]).drain()
    assert calls == [1, 2, 3]
    assert statuses() == {"key": "done"}
    assert dict(Delivery.objects.values_list("handler", "status")) == {
        "both have it": "done",
        "new": "done",
    }
    assert Handled.objects.count() == 1


def test_a_worker_that_has_left_something_to_others_lets_them_look_first(own_registry, monkeypatch):
    monkeypatch.setattr("spark_outbox.worker.rest.DEFERENCE", HOUR)
    new = Registry()
    for registry in (own_registry, new):
        registry.add_handler(lambda _: None, group="", name="old")
    new.add_handler(note, group="", name="new")
    emit("g", "key")
    event = OutboxEvent.objects.get()
    Delivery.objects.create(event=event, handler="new", attempts=1, available_at=timezone.now())
    OutboxEvent.objects.update(attempts=1, available_at=timezone.now())

    def looks():
        event.refresh_from_db()
        return event.attempts - 1

    with worker_thread(registry=own_registry):
        eventually(lambda: looks() == 1 and event.available_at < timezone.now())
        with worker_thread(registry=new):
            wait_until_done(1)
        assert looks() == 2


@pytest.mark.usefixtures("unhurried")
def test_on_commit_callbacks_of_a_failing_handler_are_dropped_and_others_run_once(own_registry):
    ran = []

    def handle(event):
        transaction.on_commit(lambda: ran.append(event.key))
        with transaction.atomic():
            transaction.on_commit(lambda: ran.append(event.key + " nested"))
        assert not ran
        if event.key == "bad":
            raise RuntimeError

    own_registry.add_handler(handle, group="")
    for key in ("good", "bad", "fine"):
        emit("g", key)
    Worker().drain()
    assert ran == ["good", "good nested", "fine", "fine nested"]


def test_an_on_commit_callback_that_raises_costs_the_others_nothing(own_registry, caplog):
    ran = []

    def handle(event):
        transaction.on_commit(lambda: ran.append(event.key) or 1 / (event.key != "bad"))

    own_registry.add_handler(handle, group="")
    for key in ("bad", "good"):
        emit("g", key)
    assert Worker().drain() == 2
    assert ran == ["bad", "good"]
    assert set(statuses().values()) == {"done"}


@pytest.mark.parametrize("touch_first", [True, False])
def test_a_database_error_is_rolled_back_with_what_else_the_handler_did(own_registry, touch_first):
    def handle(event):
        if touch_first:
            note(event)
        if event.key == "bad":
            with connection.cursor() as cursor:
                cursor.execute("select 1 / 0")
        note(event)

    own_registry.add_handler(handle, group="")
    for key in ("one", "bad", "two"):
        emit("g", key)
    Worker().drain()
    assert statuses() == {"one": "done", "bad": "pending", "two": "done"}
    assert not Handled.objects.filter(key="bad").exists()


@pytest.mark.parametrize("around", ["copy", "callproc", "stream", "raw"])
def test_what_goes_around_djangos_wrappers_is_rolled_back_too(own_registry, around):
    insert = "insert into challenges_handled (key, handler, note) values ('x', 'x', '') returning id"

    def handle(event):
        with connection.cursor() as cursor:
            if around == "copy":
                with cursor.copy("copy challenges_handled (key, handler, note) from stdin") as copy:
                    copy.write_row(("x", "x", ""))
            elif around == "callproc":
                cursor.callproc("spark_emit", ["g2", "x", "{}"])
            elif around == "stream":
                list(cursor.stream(insert))
            else:
                connection.connection.execute(insert)
        raise RuntimeError

    own_registry.add_handler(handle, group="^g$")
    emit("g", "key")
    Worker().drain()
    assert statuses() == {"key": "pending"}
    assert not Handled.objects.exists()


def test_a_handler_that_swallows_a_database_error_fails_with_a_hint(own_registry):
    def handle(event):
        note(event)
        try:
            with connection.cursor() as cursor:
                cursor.execute("select 1 / 0")
        except Exception:  # what the hint is about
            pass

    own_registry.add_handler(handle, group="")
    emit("g", "bad")
    emit("g", "fine", delay=-1)
    Worker().drain()
    assert "BrokenTransaction" in OutboxEvent.objects.get(key="bad").last_error
    assert "transaction.atomic()" in OutboxEvent.objects.get(key="bad").last_error
    assert not Handled.objects.exists()


def test_an_error_caught_outside_atomic_is_none(own_registry):
    def handle(event):
        try:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("select 1 / 0")
        except Exception:
            note(event)

    own_registry.add_handler(handle, group="")
    emit("g", "key")
    Worker().drain()
    assert statuses() == {"key": "done"}
    assert Handled.objects.count() == 1


@pytest.mark.usefixtures("unhurried")
def test_a_constraint_that_fails_at_the_commit_fails_the_event_that_broke_it_alone(own_registry):
    """Django's foreign keys are deferred: at the commit, nobody can tell whose row it was."""
    challenge = make_challenge()
    runs = []

    def donate(event):
        runs.append(event.key)
        Donation.objects.create(challenge_id=challenge.pk if event.key != "5" else -1, amount=1)

    own_registry.add_handler(donate, group="")
    emit_many({"group": "g", "key": f"{n}"} for n in range(10))
    Worker().drain()
    assert {key for key, status in statuses().items() if status == "pending"} == {"5"}
    assert Donation.objects.count() == 9
    assert "IntegrityError" in OutboxEvent.objects.get(key="5").last_error
    # The batch that could not be committed was handled again, once.
    assert len(runs) == 20


def test_the_running_worker_gets_over_it_too(own_registry):
    def donate(event):
        if event.key == "bad":
            Donation.objects.create(challenge_id=-1, amount=1)
        note(event)

    own_registry.add_handler(donate, group="")
    emit_many({"group": "g", "key": key} for key in ("1", "bad", "2"))
    with worker_thread():
        eventually(lambda: sorted(statuses().values()) == ["done", "done", "pending"])
        emit("g", "3")
        eventually(lambda: statuses()["3"] == "done")
    assert sorted(Handled.objects.values_list("key", flat=True)) == ["1", "2", "3"]


def test_a_handler_may_write_rows_that_refer_to_its_event(own_registry):
    own_registry.add_handler(
        lambda event: Delivery.objects.create(event_id=event.id, handler="mine", status="done"),
        group="",
        name="h",
    )
    emit("g", "key")
    Worker().drain()
    assert statuses() == {"key": "done"}


# Savepoints only when needed


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
        "release savepoint spark_outbox_2; savepoint spark_outbox_3",
    ]


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

    monkeypatch.setattr(savepoints, "math", SimpleNamespace(ceil=ceil))
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


# Commit interval


def test_a_batch_is_committed_once_the_commit_interval_is_over(own_registry):
    clock = Clock()

    def take_20_ms(event):
        clock.now += 0.02

    own_registry.add_handler(take_20_ms, group="")
    emit_many({"group": "g", "key": f"{n}"} for n in range(10))
    worker = Worker(clock=clock, commit_interval=0.05)
    assert worker.handle_batch() == 3
    # And the next claim holds no more rows than that.
    assert worker._claims.size.fitting == 3
    assert worker.handle_batch() == 3


def test_a_slow_handler_starts_in_a_fresh_transaction(own_registry):
    """Locks that a fast handler took must not be held while a stranger's slow one runs."""
    clock, transactions = Clock(), []

    def handle(event):
        with connection.cursor() as cursor:
            cursor.execute("select pg_current_xact_id()::text")
            transactions.append((event.key, cursor.fetchone()[0]))
        if event.group == "slow":
            clock.now += 1

    own_registry.add_handler(handle, group="slow", name="slow")
    own_registry.add_handler(handle, group="fast", name="fast")
    for number in range(4):
        emit("slow", f"slow {number}")
        emit("fast", f"fast {number}")
    worker = Worker(clock=clock)
    while worker.handle_batch():
        pass
    by_transaction = {}
    for key, transaction_id in transactions[1:]:  # at first nobody knows that it is slow
        by_transaction.setdefault(transaction_id, []).append(key)
    assert len(transactions) == 8
    for keys in by_transaction.values():
        assert not any(key.startswith("slow") for key in keys[1:])


def test_a_handler_that_got_fast_again_shares_transactions_again(own_registry):
    clock, slow = Clock(), [1.0, 0.5] + [0.0] * 100

    def handle(event):
        clock.now += slow.pop(0)

    own_registry.add_handler(handle, group="")
    emit_many({"group": "g", "key": f"{n}"} for n in range(60))
    worker = Worker(clock=clock)
    sizes = list(itertools.takewhile(bool, (worker.handle_batch() for _ in range(60))))
    assert sizes[:2] == [1, 1]
    assert max(sizes) > 10


def test_after_a_deadlock_or_lock_timeout_the_batch_is_committed_at_once(own_registry):
    make_challenge()

    def handle(event):
        if event.key == "2":
            with connection.cursor() as cursor:
                cursor.execute("set local lock_timeout = '10ms'")
            Challenge.objects.select_for_update().get()

    own_registry.add_handler(handle, group="")
    emit_many({"group": "g", "key": f"{n}"} for n in range(6))
    with connect() as other, other.transaction():
        other.execute("select from challenges_challenge for update")
        assert Worker(commit_interval=HOUR).handle_batch() == 3


# Claim


def test_the_floor_follows_the_handled_and_a_lower_id_that_commits_later_is_still_found(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    clock = Clock()
    worker = Worker(clock=clock)
    with connect() as late:
        late.execute("begin")
        late.execute("insert into spark_outbox_event (key, event_group) values ('late', 'g')")
        emit("g", "early")
        assert worker.handle_batch() == 1
        assert worker._claims.looks["ready"].floor == OutboxEvent.objects.get(key="early").id + 1
        late.execute("commit")
    assert worker.handle_batch() == 0  # below the floor
    clock.now += 1.5
    assert worker.handle_batch() == 1  # the sweep
    assert set(statuses().values()) == {"done"}


def test_delayed_events_get_their_turn_while_there_is_a_backlog(own_registry):
    order = []
    own_registry.add_handler(lambda event: order.append(event.key), group="", name="h")
    emit_many({"group": "g", "key": f"ready {n}"} for n in range(200))
    emit_many({"group": "g", "key": f"due {n}", "delay": -1} for n in range(50))
    Worker(batch_size=20, commit_interval=1e-9).drain()
    assert len(order) == 250
    assert any(key.startswith("ready") for key in order[-20:])
    assert any(key.startswith("due") for key in order[:40])


def test_a_backlog_of_due_events_does_not_starve_ready_ones_of_a_slow_handler(own_registry):
    clock, order = Clock(), []

    def slow(event):
        order.append(event.key)
        clock.now += 1

    own_registry.add_handler(slow, group="")
    emit_many({"group": "g", "key": f"due {n}", "delay": -1} for n in range(20))
    emit_many({"group": "g", "key": f"ready {n}"} for n in range(20))
    worker = Worker(clock=clock)
    for _ in range(20):
        worker.handle_batch()
    assert sum(key.startswith("ready") for key in order) >= 5
    assert sum(key.startswith("due") for key in order) >= 5


@pytest.mark.parametrize("groups", [None, "^g$"])
def test_ready_due_and_ordered_events_take_turns_if_each_takes_long(own_registry, groups):
    clock, order = Clock(), []

    def slow(event):
        order.append(event.key)
        clock.now += 1

    own_registry.add_handler(slow, group="")
    emit_many({"group": "g", "key": f"due {n}", "delay": -1} for n in range(20))
    emit_many({"group": "g", "key": f"ready {n}"} for n in range(20))
    emit_many({"group": "g", "key": f"ordered {n}", "ordering_key": "o"} for n in range(20))
    worker = Worker(clock=clock, groups=groups)
    for _ in range(21):
        worker.handle_batch()
    for kind in ("due", "ready", "ordered"):
        assert sum(key.startswith(kind) for key in order) >= 5


@pytest.mark.parametrize("delay", [None, -1])
@pytest.mark.parametrize("piece", [5, 1000])
def test_a_worker_of_some_groups_finds_all_of_its_events_among_others(
    own_registry, monkeypatch, delay, piece
):
    monkeypatch.setattr(scanning, "PIECE", piece)
    own_registry.add_handler(lambda event: None, group="", name="h")
    emit_many({"group": "theirs" if n % 7 else "ours", "delay": delay} for n in range(100))
    assert Worker(groups="^ours$").drain() == 15
    assert OutboxEvent.objects.filter(status="done", group="ours").count() == 15


def test_events_of_a_group_that_somebody_else_holds_are_found_when_they_are_free(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    emit_many({"group": "g", "key": f"{n}"} for n in range(30))
    with connect() as neighbour:
        neighbour.execute("begin")
        neighbour.execute("select from spark_outbox_event for no key update")
        with worker_thread(groups="^g$", batch_size=4):
            wait_until_asleep()
            neighbour.execute("rollback")  # as the server does for a worker that died
            wait_until_done(30)


@pytest.mark.parametrize("backlog", [3, 60])
def test_a_worker_of_some_groups_finds_what_is_committed_late_beside_a_backlog_of_others(
    own_registry, monkeypatch, backlog
):
    monkeypatch.setattr(scanning, "PIECE", 10)
    own_registry.add_handler(note, group="")
    emit_many({"group": "theirs"} for _ in range(backlog))
    with worker_thread(groups="^ours$"), connect() as late:
        wait_until_asleep()
        late.execute("begin")
        late.execute("insert into spark_outbox_event (key, event_group) values ('late', 'ours')")
        emit("ours", "early")
        eventually(lambda: handled() == ["early"])
        late.execute("commit")
        eventually(lambda: handled() == ["early", "late"])


def test_what_is_handled_in_the_sweep_before_sleep_counts_towards_max_events(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    worker = Worker(max_events=1, poll_interval=HOUR)
    fall_asleep = worker._wake.fall_asleep

    def emit_and_fall_asleep():
        emit("g", "key")
        return fall_asleep()

    worker._wake.fall_asleep = emit_and_fall_asleep
    worker.run()  # returns
    assert statuses() == {"key": "done"}


def test_groups_leaves_other_groups_to_others(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    for group in ("mail", "webhook", "mailing"):
        emit(group, group)
        emit(group, f"{group} due", delay=-1)
    assert Worker(groups="^mail$").drain() == 2
    assert statuses() == {
        "mail": "done",
        "mail due": "done",
        "webhook": "pending",
        "webhook due": "pending",
        "mailing": "pending",
        "mailing due": "pending",
    }


def test_rows_that_somebody_else_has_locked_are_passed_by(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    for key in ("held", "free"):
        emit("g", key)
    with connect() as other, other.transaction():
        other.execute("select from spark_outbox_event where key = 'held' for no key update")
        assert Worker().drain() == 1
    assert statuses() == {"held": "pending", "free": "done"}


def test_an_outcome_does_not_overwrite_what_somebody_decided_meanwhile(own_registry, caplog):
    def discard_itself(event):
        OutboxEvent.objects.filter(id=event.id).update(status="discarded")

    own_registry.add_handler(discard_itself, group="")
    emit("g", "key")
    Worker().drain()
    assert statuses() == {"key": "discarded"}
    assert "Lost the claim on 1 events" in caplog.text


# A long life


def test_the_worker_gets_over_a_connection_that_the_server_terminates(own_registry, caplog):
    own_registry.add_handler(note, group="")
    with worker_thread():
        for number in range(3):
            emit("g", f"{number}")
            eventually(lambda number=number: Handled.objects.count() == number + 1)
            wait_until_asleep()
            with connection.cursor() as cursor:
                cursor.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where application_name = 'spark_worker'"
                )
            eventually(lambda number=number: caplog.text.count("trying again") == number + 1)
            wait_until_asleep()  # it LISTENs again
        emit("g", "last")
        eventually(lambda: Handled.objects.count() == 4)


def test_an_event_whose_connection_is_lost_in_the_handler_loses_no_attempt(own_registry):
    terminated = []

    def handle(event):
        note(event)
        if not terminated:
            terminated.append(True)
            with connection.cursor() as cursor:
                cursor.execute("select pg_terminate_backend(pg_backend_pid())")
        note(event)

    own_registry.add_handler(handle, group="")
    emit("g", "key")
    with worker_thread():
        eventually(lambda: statuses() == {"key": "done"})
    assert OutboxEvent.objects.get().attempts == 1
    assert Handled.objects.count() == 2


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_other_connections_are_closed_as_at_request_boundaries(own_registry):
    seen = []

    def handle(event):
        with connections["other"].cursor() as cursor:
            cursor.execute("select 1")
        seen.append(connections["other"].connection)

    own_registry.add_handler(handle, group="")
    with worker_thread():
        emit("g", "key")
        eventually(lambda: seen and seen[0].closed)  # CONN_MAX_AGE is 0
        emit("g", "key 2")
        eventually(lambda: len(seen) == 2)
    assert set(statuses().values()) == {"done"}


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_worker_can_listen_on_another_connection_than_it_works_on(own_registry, settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": "other"}
    own_registry.add_handler(note, group="")
    with worker_thread():
        for number in range(3):
            wait_until_asleep()
            emit("g", f"{number}")
            eventually(lambda number=number: Handled.objects.count() == number + 1)
    assert set(statuses().values()) == {"done"}


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_worker_works_on_the_database_it_is_told(own_registry):
    own_registry.add_handler(note, group="")
    with worker_thread(using="other"):
        wait_until_asleep()
        emit("g", "key", using="other", delay=0.01, headers={"a": 1}, x=[1])
        emit_many([{"group": "g", "key": "key 2"}, {"group": "g", "x": "y"}], using="other")
        eventually(lambda: Handled.objects.count() == 3)
        wait_until_asleep()
    own_registry.add_handler(lambda event: 1 / 0, group="", name="fail")
    emit("g", "fails", using="other")
    assert Worker(using="other", groups="^g").drain() == 1
    assert statuses()["fails"] == "pending"


def test_under_debug_the_query_log_does_not_grow(own_registry, settings):
    settings.DEBUG = True
    lengths = []

    def handle(event):
        note(event)
        lengths.append(len(connection.queries_log))

    own_registry.add_handler(handle, group="")
    with worker_thread():
        for number in range(5):
            emit("g", f"{number}")
            eventually(lambda number=number: len(lengths) == number + 1)
            wait_until_asleep()
    assert max(lengths[1:]) < 30  # the first has the queries of its start


def test_memory_does_not_grow_with_the_events(own_registry):
    own_registry.add_handler(lambda event: event.get("n"), group="", name="h")
    worker = Worker()

    def handle_some(start):
        emit_many({"group": f"group {start + n}", "key": f"{start + n}", "n": n} for n in range(3000))
        worker.drain()
        gc.collect()
        return len(gc.get_objects())

    handle_some(0)
    before = handle_some(10_000)
    after = handle_some(20_000)
    assert after - before < 300


def test_a_worker_without_an_outbox_says_how_to_get_one(own_registry, monkeypatch):
    from spark_outbox.errors import NotMigrated

    monkeypatch.setattr(checking, "HAS_OUTBOX", "select false")
    with pytest.raises(NotMigrated, match=r"manage\.py migrate spark_outbox"):
        Worker().run(drain=True)


def test_integrity_errors_of_a_handler_are_its_own(own_registry):
    errors = []
    own_registry.add_handler(
        lambda event: OutboxEvent.objects.create(key=event.key, group="x"), group="", name="h"
    )
    emit("g", "key")
    Worker(on_error=lambda event, handler, error: errors.append(error)).drain()
    assert [type(error) for error in errors] == [IntegrityError]
