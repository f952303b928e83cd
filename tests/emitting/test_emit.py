"""emit() and its siblings: what is written, when, and what is refused."""

import asyncio
import contextlib
import random
import threading
from datetime import datetime, timedelta
from functools import partial
from typing import get_args, get_type_hints

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import DatabaseError, IntegrityError, connection, connections, transaction
from django.utils import timezone

from spark_outbox import Event, aemit, aemit_many, emit, emit_many
from spark_outbox.errors import DuplicateKey, InvalidEvent, NotInTransaction
from spark_outbox.events.event import MAX_LENGTH, time_ordered_key
from spark_outbox.models import OutboxEvent
from tests.challenges.models import Donation, Handled
from tests.tools import PATIENCE, connect, eventually, make_challenge

committed = pytest.mark.django_db(transaction=True)


@pytest.mark.django_db
def test_emit_returns_the_stored_event():
    event = emit("order_paid", "order_paid_1", amount=5)

    stored = OutboxEvent.objects.get()
    assert (stored.group, stored.key, stored.payload) == ("order_paid", "order_paid_1", {"amount": 5})
    assert (stored.status, stored.attempts, stored.available_at) == ("pending", 0, None)
    assert isinstance(event, Event)
    assert (event.id, event.created_at, event["amount"]) == (stored.id, stored.created_at, 5)


@pytest.mark.django_db
def test_a_duplicate_returns_none_and_leaves_the_transaction_healthy():
    with transaction.atomic():
        assert emit("a", "key")
        assert emit("b", "key") is None
        assert emit("c", "other")  # the transaction goes on
    assert list(OutboxEvent.objects.values_list("group", flat=True)) == ["a", "c"]


@committed
def test_on_duplicate_says_what_an_existing_key_means():
    challenge = make_challenge()
    OutboxEvent.objects.all().delete()
    assert emit("g", "key", n=1, challenge=challenge, on_duplicate="raise")
    assert emit("g", "key", n=2) is None
    assert emit("g", "key", challenge=challenge, n=1, on_duplicate="check") is None
    with transaction.atomic():
        for different in ({"n": 2, "challenge": challenge}, {"n": 1}, {}):
            with pytest.raises(DuplicateKey, match="another group or payload"):
                emit("g", "key", **different, on_duplicate="check")
        with pytest.raises(DuplicateKey, match="another group or payload"):
            emit("h", "key", n=1, challenge=challenge, on_duplicate="check")
        with pytest.raises(DuplicateKey, match="already"):
            emit("g", "key", n=1, challenge=challenge, on_duplicate="raise")
        assert emit("g", "other")  # the transaction is healthy
    with pytest.raises(InvalidEvent, match="ignore, raise, check"):
        emit("g", "key", on_duplicate="replace")
    assert OutboxEvent.objects.count() == 2
    assert not Donation.objects.exists()


@pytest.mark.django_db
@pytest.mark.parametrize(
    "event",
    [
        Event("group", "key", delay=60, headers={"trace": "1"}, ordering_key="o", n=1),
        {
            "group": "group",
            "key": "key",
            "delay": 60,
            "headers": {"trace": "1"},
            "ordering_key": "o",
            "n": 1,
        },
    ],
)
def test_an_event_and_a_dict_of_the_same_names_mean_the_same(event):
    assert emit(event)
    stored = OutboxEvent.objects.get()
    assert (stored.group, stored.key, stored.ordering_key) == ("group", "key", "o")
    assert (stored.payload, stored.headers) == ({"n": 1}, {"trace": "1"})
    assert stored.available_at == stored.created_at + timedelta(minutes=1)


@pytest.mark.django_db
def test_without_a_key_events_get_keys_in_the_order_of_time():
    keys = [emit("group").key for _ in range(3)]
    assert len(set(keys)) == 3
    assert [key[14] for key in keys] == ["7", "7", "7"]
    assert time_ordered_key()[:8] >= keys[0][:8]


@pytest.mark.django_db
def test_available_at_is_stored_as_it_is():
    at = timezone.now() + timedelta(days=1)
    emit("group", "key", available_at=at)
    assert OutboxEvent.objects.get().available_at == at


@committed
def test_rollback_emits_nothing():
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        emit("group", "key")
        raise ZeroDivisionError
    assert not OutboxEvent.objects.exists()


@committed
def test_rollback_to_a_savepoint_emits_nothing():
    with transaction.atomic():
        emit("group", "outer")
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            emit("group", "inner")
            emit_many([{"group": "group", "key": "bulk"}])
            raise ZeroDivisionError
    assert [event.key for event in OutboxEvent.objects.all()] == ["outer"]


@committed
def test_on_commit_knows_what_the_end_of_atomic_does_not_tell():
    """That Django has rolled back, and raised nothing, since a savepoint's rollback had failed."""
    callbacks = []
    with transaction.atomic():
        emit("group", "outer")
        transaction.on_commit(lambda: callbacks.append("committed"))
        with contextlib.suppress(ZeroDivisionError), transaction.atomic(), connect() as other:
            emit("group", "inner")
            pid = connection.connection.info.backend_pid
            other.execute("select pg_terminate_backend(%s, 10000)", [pid])
            raise ZeroDivisionError
    assert not OutboxEvent.objects.exists()
    assert callbacks == []


@committed
def test_nobody_sees_an_event_before_its_commit():
    with transaction.atomic(), connect() as other:
        emit("group", "key")
        assert other.execute("select count(*) from spark_outbox_event").fetchone() == (0,)


@committed
@pytest.mark.parametrize("first_commits", [True, False])
def test_of_two_concurrent_transactions_with_one_key_exactly_one_has_the_event(first_commits):
    results = {}

    def second():
        with transaction.atomic():
            results["second"] = emit("group", "key", by="second")
            emit("group", "after")  # it goes on, whatever came of the first
        connections.close_all()

    thread = threading.Thread(target=second)
    with transaction.atomic():
        results["first"] = emit("group", "key", by="first")
        thread.start()
        with connect() as other:
            eventually(
                lambda: other.execute(
                    "select 1 from pg_stat_activity where wait_event_type = 'Lock' "
                    "and query ilike '%insert into spark_outbox_event%' and pid <> pg_backend_pid()"
                ).fetchone()
            )
        transaction.set_rollback(not first_commits)
    thread.join(PATIENCE)

    assert results["first"]
    assert bool(results["second"]) is not first_commits
    winner = OutboxEvent.objects.get(key="key")
    assert winner.payload == {"by": "first" if first_commits else "second"}
    assert OutboxEvent.objects.filter(key="after").exists()


@pytest.mark.django_db
def test_emit_many_streams_any_iterable_and_counts_what_is_new(django_assert_num_queries):
    emit("group", "key-3")
    with django_assert_num_queries(3):
        new = emit_many(
            ({"group": "group", "key": f"key-{n}", "n": n} for n in range(25)), chunk_size=10
        )
    assert new == 24
    assert OutboxEvent.objects.count() == 25
    assert emit_many([]) == 0


@pytest.mark.django_db
def test_emit_many_takes_mixed_events_and_repeated_keys():
    at = timezone.now() + timedelta(hours=1)
    assert (
        emit_many(
            [
                Event("a", "1", available_at=at),
                {"group": "b", "key": "2", "delay": timedelta(seconds=5), "x": [None, "'\"\\{},"]},
                {"group": "c", "key": "2"},
                {"group": "d", "ordering_key": "o", "headers": {"h": 1}},
            ]
        )
        == 3
    )
    one, two, three = OutboxEvent.objects.order_by("group")
    assert (one.available_at, two.payload, three.ordering_key) == (at, {"x": [None, "'\"\\{},"]}, "o")
    assert (two.available_at - two.created_at, three.headers) == (timedelta(seconds=5), {"h": 1})


@committed
def test_two_bulk_emits_of_the_same_keys_do_not_deadlock():
    results = []
    barrier = threading.Barrier(2)

    def bulk(keys, round_number):
        barrier.wait(PATIENCE)
        with transaction.atomic():
            results.append(emit_many({"group": "g", "key": f"{round_number}-{k}"} for k in keys))

    def bulks(keys):
        try:
            for round_number in range(20):
                bulk(keys, round_number)
        finally:
            connections.close_all()

    forwards = [f"{n:04}" for n in range(300)]
    threads = [threading.Thread(target=bulks, args=(keys,)) for keys in (forwards, forwards[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(results) == 40
    assert sum(results) == OutboxEvent.objects.count() == 20 * 300


@committed
def test_async_code_emits():
    async def run():
        assert (await aemit("group", "1", n=1)).key == "1"
        assert await aemit("group", "1") is None

        async def stream():
            for n in range(7):
                yield {"group": "group", "key": f"{n}"}

        assert await aemit_many([{"group": "group", "key": "list"}]) == 1
        new = await aemit_many(stream(), chunk_size=3)
        await sync_to_async(connections.close_all)()
        return new

    assert asyncio.run(run()) == 6
    assert OutboxEvent.objects.count() == 8


def emit_beside_a_ledger_row(key, fails):
    with transaction.atomic():
        Handled.objects.create(key=key)
        emit("group", key)
        if fails:
            raise ZeroDivisionError


@committed
def test_a_cancelled_task_leaves_both_the_row_and_its_event_or_neither():
    """With the pattern of the README, whenever the task is cancelled."""
    dice = random.Random(29)

    async def run(number):
        task = asyncio.create_task(
            sync_to_async(emit_beside_a_ledger_row)(f"{number}", fails=dice.random() < 0.1)
        )
        for _ in range(dice.randrange(300)):
            await asyncio.sleep(0)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        return outcome

    async def run_all():
        outcomes = await asyncio.gather(*map(run, range(200)))
        await sync_to_async(connections.close_all)()  # runs after all that is under way
        return outcomes

    outcomes = asyncio.run(run_all())
    rows = list(Handled.objects.order_by("id").values_list("key", flat=True))
    assert rows == list(OutboxEvent.objects.order_by("id").values_list("key", flat=True))
    assert any(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    # Who was not cancelled knows what came of it. Who was may have committed nevertheless.
    finished = {f"{number}" for number, outcome in enumerate(outcomes) if outcome is None}
    assert finished <= set(rows)


@committed
def test_require_atomic_says_in_async_code_what_to_do_there(settings):
    settings.SPARK_OUTBOX = {"REQUIRE_ATOMIC": True}

    async def stream():
        yield {"group": "group"}

    for attempt in (
        partial(aemit, "group", "key"),
        partial(aemit_many, [{"group": "group"}]),
        partial(aemit_many, stream()),
    ):
        with pytest.raises(NotInTransaction, match=r"transaction\.atomic.*sync_to_async\(function\)"):
            async_to_sync(attempt)()
    async_to_sync(sync_to_async(emit_beside_a_ledger_row))("key", fails=False)
    with transaction.atomic():  # the thread, and so the connection, of the block
        assert async_to_sync(aemit)("group", "in the block")
    assert OutboxEvent.objects.count() == 2


# From SQL


@pytest.mark.django_db
def test_a_plain_insert_of_key_and_group_is_a_valid_event():
    with connection.cursor() as cursor:
        cursor.execute("insert into spark_outbox_event (key, event_group) values ('k', 'g')")
        cursor.execute(
            "insert into spark_outbox_event (key, event_group, payload) values ('l', 'g', '{\"a\": 1}')"
        )
    assert [e.payload for e in OutboxEvent.objects.order_by("id")] == [{}, {"a": 1}]


@pytest.mark.django_db
def test_spark_emit_returns_the_id_or_null_for_a_duplicate():
    def spark_emit(*arguments):
        with connection.cursor() as cursor:
            cursor.execute(f"select spark_emit({', '.join(['%s'] * len(arguments))})", arguments)
            return cursor.fetchone()[0]

    assert spark_emit("group", "key", '{"n": 1}') == OutboxEvent.objects.get().id
    assert spark_emit("group", "key", "{}") is None
    assert spark_emit("group", "other") > 0
    assert spark_emit("group", None) > 0
    assert OutboxEvent.objects.get(key="key").payload == {"n": 1}


# What is refused


@pytest.mark.django_db
@pytest.mark.parametrize("name", ["group", "key", "ordering_key"])
@pytest.mark.parametrize("value", ["", "x" * (MAX_LENGTH + 1), "a\0b", "\ud800", 5, b"bytes"])
def test_a_group_or_key_that_the_table_refuses_is_refused_by_emit(name, value):
    with pytest.raises(InvalidEvent, match=name):
        emit({"group": "group", "key": "key", name: value})
    assert not OutboxEvent.objects.exists()


@pytest.mark.django_db
@pytest.mark.parametrize("column", ["key", "event_group", "ordering_key"])
@pytest.mark.parametrize("value", ["", "ä" * (MAX_LENGTH + 1)])
def test_the_database_checks_lengths_itself(column, value):
    columns = {"key": "key", "event_group": "group", column: value}
    with pytest.raises(IntegrityError, match="length"), connection.cursor() as cursor:
        cursor.execute(
            f"insert into spark_outbox_event ({', '.join(columns)}) "
            f"values ({', '.join(['%s'] * len(columns))})",
            list(columns.values()),
        )


@pytest.mark.django_db
def test_the_longest_group_and_keys_fit():
    longest = "😀" * MAX_LENGTH
    assert emit(longest, longest, ordering_key=longest)


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"key": "k"}, "no group"),
        (["group"], "an Event or a dict"),
        ({"group": "g", "delay": 1, "available_at": timezone.now()}, "not both"),
        ({"group": "g", "delay": "soon"}, "seconds or a timedelta"),
        ({"group": "g", "delay": float("nan")}, "seconds or a timedelta"),
        ({"group": "g", "delay": timedelta.max}, "more than 36500 days"),
        ({"group": "g", "headers": "trace"}, "The headers are a mapping, not str"),
        ({"group": "g", 5: 5}, "This is no event"),
        ({"group": "g", "available_at": "tomorrow"}, "a datetime"),
        ({"group": "g", "available_at": datetime(2030, 1, 1)}, "make_aware"),
    ],
)
def test_an_event_that_makes_no_sense_is_refused_with_the_cure(event, message):
    with pytest.raises(InvalidEvent, match=message):
        emit(event)


@pytest.mark.django_db
def test_options_beside_a_whole_event_are_refused():
    with pytest.raises(InvalidEvent, match="not both"):
        emit(Event("group", "key"), delay=5)


def test_on_duplicate_is_typed_as_what_it_takes():
    for function in (emit, aemit):
        assert get_args(get_type_hints(function)["on_duplicate"]) == ("ignore", "raise", "check")


@pytest.mark.django_db
@pytest.mark.parametrize("group", [5, None, b"g", ["g"]])
def test_a_group_that_is_no_text_is_named_also_beside_options(group):
    with pytest.raises(InvalidEvent, match=rf"a group \(text\), .* {type(group).__name__}: "):
        emit(group, "x", n=1)


@committed
def test_require_atomic_refuses_emit_outside_a_transaction(settings):
    settings.SPARK_OUTBOX = {"REQUIRE_ATOMIC": True}
    for attempt in (lambda: emit("group", "key"), lambda: emit_many([{"group": "group"}])):
        with pytest.raises(NotInTransaction, match=r"transaction\.atomic"):
            attempt()
    with transaction.atomic():
        assert emit("group", "key")


@committed
def test_by_default_emit_outside_a_transaction_commits_by_itself():
    emit("group", "key")
    with connect() as other:
        assert other.execute("select key from spark_outbox_event").fetchone() == ("key",)


@committed
def test_database_errors_pass_through_unwrapped():
    with pytest.raises(DatabaseError), transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("set local default_transaction_read_only = on")
            cursor.execute("set transaction read only")
        emit("group", "key")
