"""The signals: what is told of emits, calls, batches and workers, and that receivers can't do harm."""

import asyncio
import contextlib
import logging
import time
from contextvars import ContextVar
from datetime import date

import pytest
from django.core.management import call_command
from django.db import connection, transaction

from spark_outbox import BatchFailed, Discard, Retry, aemit, emit, emit_many, handler, source
from spark_outbox.errors import BrokenTransaction, HandlerTimeout, UnreadablePayload
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.observing import hooks
from spark_outbox.observing.hooks import ReceiverQuery
from spark_outbox.processes.guard import Guard
from spark_outbox.testing import drain
from spark_outbox.worker import settle
from tests.challenges.models import Challenge, Handled
from tests.tools import deliveries, eventually, note, statuses, work, worker_thread

pytestmark = pytest.mark.django_db(transaction=True)


@contextlib.contextmanager
def listening(signal, receiver):
    signal.connect(receiver, weak=False)
    try:
        yield
    finally:
        signal.disconnect(receiver)


@pytest.fixture
def emissions():
    """What `event_emitted` says: groups and keys."""
    told = []
    with listening(hooks.event_emitted, lambda group, key, **_: told.append((group, key))):
        yield told


@pytest.fixture
def calls():
    """The calls that have begun, and those that have ended."""
    begun, ended = [], []

    def begin(call, **_):
        begun.append(call)

    def end(call, **_):
        assert call in begun
        ended.append(call)

    with listening(hooks.delivery_started, begin), listening(hooks.delivery_finished, end):
        yield begun, ended


def told(calls):
    """Return each ended call's handler, its events' keys with their statuses, and its error's type."""
    begun, ended = calls
    assert len(begun) == len(ended)
    return [
        (
            call.handler,
            {event.key: call.statuses.get(event.id) for event in call.events},
            type(call.error) if call.error is not None else None,
        )
        for call in ended
    ]


# Emits


def test_each_new_event_is_told_once_whoever_emits_it(emissions, own_registry):
    emit("g", "1")
    emit("g", "1")
    emit_many([{"group": "g", "key": key} for key in ["3", "2", "1"]])
    emit_many([{"group": "first", "key": "4"}, {"group": "second", "key": "4"}])
    asyncio.run(aemit("g", "5"))
    assert emissions == [("g", "1"), ("g", "3"), ("g", "2"), ("first", "4"), ("g", "5")]


def test_sources_tell_but_not_in_a_dry_run_nor_of_what_is_written_as_done(emissions, own_registry):
    @source(Challenge)
    def created(challenge):
        yield {"group": "created", "key": f"created_{challenge.pk}"}

    dates = {"start_date": date(2026, 1, 1), "end_date": date(2999, 1, 1)}
    first = Challenge.objects.create(title="saved", **dates)
    assert emissions == [("created", f"created_{first.pk}")]
    Challenge.objects.bulk_create([Challenge(title="bulk", **dates)])
    sweep = ["process_spark_sources", "challenges.Challenge"]
    call_command(*sweep, dry_run=True, verbosity=0)
    assert len(emissions) == 1
    call_command(*sweep, yes=True, verbosity=0)
    assert len(emissions) == 2
    Challenge.objects.bulk_create([Challenge(title="bulk", **dates)])
    call_command(*sweep, as_done=True, verbosity=0)
    assert len(emissions) == 2


def test_receivers_add_headers_that_are_stored_and_change_nothing_of_the_emitters():
    def add(emission, **_):
        emission.add({"mine": "1", "yours": "2"})
        emission.add({"baggage": "a=1"})
        emission.add({"baggage": "b=2"})

    event = {"group": "g", "key": "1", "headers": {"mine": "given", "at": date(2026, 1, 1)}}
    with listening(hooks.emission_started, add):
        emit(event)
        emit_many(
            [{"group": "g", "key": "2", "headers": {"baggage": "c=3"}}, {"group": "g", "key": "3"}]
        )
    assert event["headers"] == {"mine": "given", "at": date(2026, 1, 1)}
    assert dict(OutboxEvent.objects.values_list("key", "headers")) == {
        "1": {"mine": "given", "at": {"$": ["date", "2026-01-01"]}, "baggage": "a=1,b=2"},
        "2": {"mine": "1", "yours": "2", "baggage": "c=3"},
        "3": {"mine": "1", "yours": "2", "baggage": "a=1,b=2"},
    }


def test_an_emission_is_one_statement_and_says_which_of_its_events_are_new():
    seen = []
    with (
        listening(hooks.emission_started, lambda emission, **_: seen.append(emission)),
        listening(hooks.emission_finished, lambda emission, **_: seen.append(emission)),
    ):
        emit("g", "1")
        emit_many([{"group": "g", "key": key} for key in ["1", "2", "2", "3"]], chunk_size=3)
    assert [[each.key for each in emission.events] for emission in seen[::2]] == [
        ["1"],
        ["1", "2", "2"],
        ["3"],
    ]
    assert seen[::2] == seen[1::2]
    assert [[each.key for each in emission.new] for emission in seen[::2]] == [["1"], ["2"], ["3"]]


def test_an_emission_that_fails_has_its_error_and_emits_nothing(emissions):
    ended = []
    with (
        listening(hooks.emission_finished, lambda emission, **_: ended.append(emission)),
        pytest.raises(ZeroDivisionError),
        connection.execute_wrapper(lambda *_: 1 / 0),
    ):
        emit("g", "1")
    assert isinstance(ended[0].error, ZeroDivisionError)
    assert (list(ended[0].new), emissions) == ([], [])


def test_sql_may_give_headers():
    with connection.cursor() as cursor:
        cursor.execute("""select spark_emit('g', 'key', '{"n": 1}', '{"traceparent": "00"}')""")
    assert OutboxEvent.objects.get().headers == {"traceparent": "00"}


# Calls


def register(**kinds):
    """Register a handler of each kind that raises what its function does, in order of `kinds`."""
    for name, (function, options) in kinds.items():
        handler("^g$", name=name, max_attempts=1, **options)(function)


def test_every_kind_of_call_is_told_with_its_status_after_the_commit(own_registry, calls):
    async def later(event):
        await asyncio.sleep(0)

    kinds = {
        "plain": (note, {}),
        "list": (lambda events: None, {"batch": 10}),
        "async": (later, {}),
        "detached": (lambda event: None, {"atomic": False}),
    }
    register(**kinds)
    committed = []
    with listening(
        hooks.delivery_finished, lambda call, **_: committed.append(connection.in_atomic_block)
    ):
        emit_many([{"group": "g", "key": "1"}, {"group": "g", "key": "2"}])
        work()
    assert set(statuses().values()) == {"done"}
    each = [
        (name, key, status, error)
        for name, by_key, error in told(calls)
        for key, status in by_key.items()
    ]
    assert sorted(each) == sorted((name, key, "done", None) for name in kinds for key in "12")
    assert set(committed) == {False}


@pytest.mark.parametrize(
    "outcome",
    [
        (ValueError(), 1, "failed"),
        (ValueError(), 2, "pending"),
        (Retry(), 2, "pending"),
        (Discard(), 1, "discarded"),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "list", "async", "detached", "inline"])
def test_a_call_that_fails_is_told_with_its_error_and_what_comes_of_it(
    own_registry, calls, outcome, kind
):
    error, attempts, status = outcome

    def fail(event):
        raise error

    async def fail_later(event):
        raise error

    options = {"list": {"batch": 10}, "detached": {"atomic": False}}.get(kind, {})
    function = fail_later if kind in {"async", "inline"} else fail
    handler("", name="h", max_attempts=attempts, backoff=3600, **options)(function)
    emit("g", "key")
    drain(raise_exceptions=False) if kind == "inline" else work()
    assert told(calls) == [("h", {"key": status}, type(error))]


def test_of_a_list_each_event_has_its_status(own_registry, calls):
    @handler("", name="h", batch=10, max_attempts=1)
    def some(events):
        raise BatchFailed({events[1]: ValueError()})

    emit_many([{"group": "g", "key": "1"}, {"group": "g", "key": "2"}])
    work()
    assert told(calls) == [("h", {"1": "done", "2": "failed"}, BatchFailed)]


@pytest.mark.parametrize("kind", ["plain", "async", "detached"])
def test_a_call_that_takes_too_long_is_told(own_registry, calls, kind):
    async def slow_async(event):
        await asyncio.sleep(60)

    function = slow_async if kind == "async" else lambda event: time.sleep(60)
    handler("", name="h", timeout=0.05, max_attempts=1, atomic=kind != "detached")(function)
    emit("g", "key")
    work(guard=Guard())
    assert told(calls) == [("h", {"key": "failed"}, HandlerTimeout)]


def test_a_call_that_ends_the_transaction_is_told_and_those_beside_it_are_rolled_back(
    own_registry, calls, unhurried
):
    own_registry.add_handler(note, group="^good$", name="note")

    @handler("^bad$", name="bad", max_attempts=1)
    def bad(event):
        connection.close()

    emit("good", "1")
    emit("bad", "2")
    work()
    assert statuses() == {"1": "done", "2": "failed"}
    assert told(calls) == [
        ("note", {"1": None}, None),
        ("bad", {"2": "failed"}, BrokenTransaction),
        ("note", {"1": "done"}, None),
    ]


def test_calls_of_a_batch_that_is_refused_are_rolled_back_and_made_again(
    own_registry, calls, unhurried, monkeypatch
):
    own_registry.add_handler(note, group="", name="note")
    write, refused = settle.write, []

    def refuse_once(*args, **options):
        if not refused:
            refused.append(True)
            with connection.cursor() as cursor:
                cursor.execute("select 1 / 0")
        write(*args, **options)

    monkeypatch.setattr(settle, "write", refuse_once)
    emit("g", "1")
    emit("g", "2")
    work()
    assert set(statuses().values()) == {"done"}
    rolled_back = [("note", {"1": None}, None), ("note", {"2": None}, None)]
    assert told(calls) == [*rolled_back, ("note", {"1": "done"}, None), ("note", {"2": "done"}, None)]


def test_a_payload_that_cannot_be_read_is_told_as_calls_that_failed(own_registry, calls):
    for name in ("first", "second"):
        own_registry.add_handler(note, group="", name=name)
    OutboxEvent.objects.create(group="g", key="key", payload={"a": {"$": ["?"]}})
    work()
    assert told(calls) == [(name, {"key": "failed"}, UnreadablePayload) for name in ("first", "second")]


def test_a_detached_call_that_others_have_taken_over_is_not_told_as_done(own_registry, calls):
    lost = []

    def lose_the_first(event):
        if not lost:
            lost.append(event.key)
            Delivery.objects.update(status="pending")
            OutboxEvent.objects.update(status="pending")

    settled = []
    own_registry.add_handler(lose_the_first, group="", name="h", atomic=False)
    emit("g", "key")
    with listening(hooks.calls_settled, lambda others, **_: settled.append(others)):
        work()
    assert told(calls) == [("h", {"key": None}, None), ("h", {"key": "done"}, None)]
    assert settled == ["done"]


@pytest.mark.parametrize("is_async", [False, True])
def test_an_async_receiver_breaks_nothing(own_registry, is_async, caplog):
    def plain(event):
        Handled.objects.create(key="key")

    async def concurrent(event):
        await Handled.objects.acreate(key="key")

    async def receiver(**_):
        pass

    handler("", name="h", max_attempts=1)(concurrent if is_async else plain)
    emit("g", "key")
    with listening(hooks.delivery_started, receiver):
        work()
    assert statuses() == {"key": "done"}
    assert Handled.objects.count() == 1


def test_an_error_is_told_with_how_long_the_call_took(own_registry, calls):
    own_registry.add_handler(note, group="")
    before = time.time()
    emit("g", "key")
    work()
    (call,) = calls[1]
    assert before <= call.started_at <= call.started_at + call.seconds <= time.time()


mark = ContextVar("mark", default="")


@pytest.mark.parametrize("kind", ["plain", "timed", "list", "async", "detached"])
def test_a_context_variable_of_the_start_is_there_in_the_handler_and_at_the_end_alone(
    own_registry, kind
):
    seen = []

    def see(event):
        seen.append(mark.get())
        mark.set(f"{mark.get()}, handled")

    async def see_later(event):
        see(event)

    kinds = {"list": {"batch": 10}, "detached": {"atomic": False}, "timed": {"timeout": 60}}
    handler("", name="h", **kinds.get(kind, {}))(see_later if kind == "async" else see)
    emit("g", "key")
    with (
        listening(hooks.delivery_started, lambda call, **_: mark.set(f"mark{mark.get()}")),
        listening(hooks.delivery_finished, lambda call, **_: seen.append(mark.get())),
    ):
        work()
        emit("g", "again")
        work()
    assert seen == ["mark", "mark, handled"] * 2
    assert mark.get() == ""


# Receivers that misbehave


def query(**_):
    Handled.objects.count()


def query_past_django(**_):
    with connection.cursor() as cursor:
        cursor.execute("select 1")


def save(**_):  # where Django notes that the transaction is to be rolled back
    Handled.objects.create(key="of a receiver")


def fail(**_):
    raise RuntimeError


@pytest.mark.parametrize("receiver", [query, query_past_django, save, fail])
@pytest.mark.parametrize("kind", ["plain", "list", "detached", "failing", "unreadable"])
def test_a_receiver_that_raises_or_queries_is_logged_and_breaks_nothing(
    own_registry, receiver, kind, caplog
):
    def work_or_fail(event):
        Handled.objects.create(key="key")
        if kind == "failing":
            raise ValueError

    options = {"list": {"batch": 10}, "detached": {"atomic": False}}.get(kind, {})
    handler("", name="h", max_attempts=1, **options)(work_or_fail)
    signals = [
        hooks.emission_started,
        hooks.emission_finished,
        hooks.event_emitted,
        hooks.delivery_started,
        hooks.delivery_finished,
        hooks.calls_settled,
        hooks.batch_settled,
        hooks.worker_state_changed,
    ]
    with contextlib.ExitStack() as stack:
        for signal in signals:
            stack.enter_context(listening(signal, receiver))
        with transaction.atomic():
            emit("g", "key")
        if kind == "unreadable":
            OutboxEvent.objects.update(payload={"a": {"$": ["?"]}})
        work()
    assert statuses() == {"key": "failed" if kind in {"failing", "unreadable"} else "done"}
    assert Handled.objects.count() == (kind not in {"failing", "unreadable"})
    logged = [each for each in caplog.records if each.name == "django.dispatch"]
    assert len(logged) >= len(signals)
    expected = RuntimeError if receiver is fail else ReceiverQuery
    assert all(isinstance(each.exc_info[1], expected) for each in logged)
    assert connection.execute_wrappers == []


def test_nothing_is_noted_while_nobody_listens(own_registry, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    for name in ("HandlerCall", "Emission"):
        monkeypatch.setattr(hooks, name, refuse)
    own_registry.add_handler(note, group="")
    emit("g", "1")
    emit_many([{"group": "g", "key": "2"}])
    work()
    assert set(statuses().values()) == {"done"}


# Batches and workers


def test_a_batch_is_told_after_its_commit(own_registry, unhurried):
    batches = []
    own_registry.add_handler(note, group="")
    emit_many([{"group": "g", "key": f"{n}"} for n in range(3)])

    def settled(using, events, seconds, commit_seconds, calls, **_):
        assert [call.handler for call in calls] == ["tests.tools.note"] * len(calls)
        batches.append((using, events, len(calls), connection.in_atomic_block))
        assert 0 <= commit_seconds <= seconds

    with (
        listening(hooks.batch_settled, settled),
        listening(hooks.delivery_started, lambda **_: None),
    ):
        work()
    assert batches == [("default", 3, 3, False)]


def test_a_worker_tells_its_states(own_registry, caplog):
    states = []
    own_registry.add_handler(note, group="")
    caplog.set_level(logging.CRITICAL)
    with (
        listening(hooks.worker_state_changed, lambda state, reason, **_: states.append((state, reason))),
        worker_thread(),
    ):
        eventually(lambda: states[-1:] == [("asleep", "")])
        emit("g", "key")
        eventually(lambda: statuses() == {"key": "done"})
        with connection.cursor() as cursor:
            cursor.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where pid <> pg_backend_pid() and application_name like 'spark_worker%'"
            )
        eventually(lambda: "disconnected" in dict(states))
        eventually(lambda: states[-1:] == [("asleep", "")])
    assert states[:2] == [("ready", ""), ("asleep", "")]
    assert ("awake", "notification") in states
    assert [state for state, _ in states].count("ready") == 2
    assert states[-1] == ("stopped", "")


def test_deliveries_match_what_was_told(own_registry, calls):
    handler("", name="h", max_attempts=3, backoff=0)(fail_on)
    emit("g", "key")
    work()
    assert deliveries() == {"h": ("failed", 3)}
    assert [each for _, each, _ in told(calls)] == [{"key": s} for s in ["pending", "pending", "failed"]]


def fail_on(event):
    raise ValueError
