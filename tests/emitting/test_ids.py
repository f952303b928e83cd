"""Ids: they follow the order in which events were given, and one that is taken loses no event."""

import io
import threading

import pytest
from asgiref.sync import async_to_sync
from django.core.management import CommandError, call_command
from django.db import IntegrityError, OperationalError, connection, connections, transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.errors import SerializationFailure, UniqueViolation

from spark_outbox import Event, aemit_many, checks, emit, emit_many, handler, source
from spark_outbox.errors import DuplicateKey, IdCollision
from spark_outbox.models import OutboxEvent
from spark_outbox.store import checking
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Challenge, Handled
from tests.statements import Statements
from tests.tools import PATIENCE, connect, eventually, handled, make_challenge, note

pytestmark = pytest.mark.django_db(transaction=True)


def keys_by_id():
    return list(OutboxEvent.objects.order_by("id").values_list("key", flat=True))


def groups_by_id():
    return list(OutboxEvent.objects.order_by("id").values_list("group", flat=True))


# In the order given

STEPS = [f"step_{n}" for n in range(1, 13)]  # step_10 sorts before step_2


def step(key):
    return {"group": "g", "key": key, "ordering_key": "import"}


@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_ids_follow_the_order_given_and_not_that_of_the_keys(chunk_size):
    assert emit_many(map(step, STEPS), chunk_size=chunk_size) == 12
    assert keys_by_id() == STEPS


def test_events_without_keys_get_ids_in_the_order_given():
    groups = [f"group {n}" for n in range(50)]
    emit_many({"group": group} for group in groups)
    assert groups_by_id() == groups


def test_async_code_emits_in_the_order_given():
    async def steps():
        for key in STEPS:
            yield step(key)

    async_to_sync(aemit_many)(steps(), chunk_size=5)
    assert keys_by_id() == STEPS


def test_events_with_times_and_without_get_ids_in_the_order_given():
    emit_many(Event("g", key, delay=60 if number % 2 else None) for number, key in enumerate(STEPS))
    assert keys_by_id() == STEPS


def test_what_is_new_among_duplicates_keeps_its_order():
    emit_many(map(step, ["step_3", "step_11"]))
    assert emit_many(map(step, STEPS)) == 10
    new = [key for key in STEPS if key not in ("step_3", "step_11")]
    assert keys_by_id() == ["step_3", "step_11", *new]


def test_of_a_key_that_is_given_twice_the_first_is_written():
    emit_many([Event("z", "b"), Event("a", "c"), Event("a", "b"), Event("a", "a")])
    assert groups_by_id() == ["z", "a", "a"]
    assert keys_by_id() == ["b", "c", "a"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=4)),
    st.integers(1, 7),
)
def test_whatever_the_keys_are_ids_follow_the_order_given(keys, chunk_size):
    OutboxEvent.objects.all().delete()
    new = list(dict.fromkeys(keys))
    assert emit_many(({"group": "g", "key": key} for key in keys), chunk_size=chunk_size) == len(new)
    assert keys_by_id() == new
    assert emit_many({"group": "g", "key": key} for key in reversed(keys)) == 0


@pytest.fixture
def placed_then_paid(own_registry):
    """A source whose events sort the other way round; ordered by the challenge."""

    @source(Challenge)
    def events(challenge):
        for what in ("placed", "paid"):
            yield {
                "group": what,
                "key": f"{what}_{challenge.pk}",
                "ordering_key": f"challenge_{challenge.pk}",
            }

    own_registry.add_handler(note, group="", name="note")


def test_what_a_source_yields_on_save_is_handled_in_the_order_it_was_yielded(placed_then_paid):
    challenge = make_challenge()
    Worker().drain()
    assert handled() == [f"placed_{challenge.pk}", f"paid_{challenge.pk}"]


def test_a_sweep_emits_in_the_order_of_instances_and_of_what_their_sources_yield(placed_then_paid):
    challenges = [make_challenge(f"{n}") for n in range(12)]
    OutboxEvent.objects.all().delete()
    call_command("process_spark_sources", "--chunk-size", "5", stdout=io.StringIO())
    expected = [f"{what}_{challenge.pk}" for challenge in challenges for what in ("placed", "paid")]
    assert keys_by_id() == expected
    Worker().drain()
    for challenge in challenges:
        mine = [key for key in handled() if key.endswith(f"_{challenge.pk}")]
        assert mine == [f"placed_{challenge.pk}", f"paid_{challenge.pk}"]


def test_a_worker_handles_one_ordering_key_in_the_order_given(own_registry):
    own_registry.add_handler(note, group="")
    emit_many(map(step, STEPS), chunk_size=5)
    Worker(batch_size=5).drain()
    assert handled() == STEPS


def test_sweeps_and_bulk_emits_of_the_same_keys_in_opposite_orders_do_not_deadlock():
    """In each round both begin at once; each key is new, so whoever comes second waits for the first."""
    errors, counts = [], []
    barrier = threading.Barrier(2)

    def bulks(order):
        try:
            for round_number in range(20):
                keys = [f"{round_number} {n:03}" for n in range(200)][::order]
                barrier.wait(PATIENCE)
                with transaction.atomic():
                    counts.append(emit_many({"group": "g", "key": key} for key in keys))
        except Exception as error:
            errors.append(error)
            barrier.abort()
        finally:
            connections.close_all()

    threads = [threading.Thread(target=bulks, args=(order,)) for order in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert errors == []
    assert sum(counts) == OutboxEvent.objects.count() == 20 * 200


# An id that is taken is no duplicate

CURE = checking.PUT_IDS_RIGHT


def execute(sql, *parameters):
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchone()[0]


@pytest.fixture
def lagging():
    """A table whose sequence is behind it, as after a restore of the data alone."""
    ids = [emit("g", f"old {number}").id for number in range(5)]

    def set_back():
        execute("select setval(pg_get_serial_sequence('spark_outbox_event', 'id'), %s, false)", min(ids))

    set_back()
    yield set_back
    execute(CURE)


def sweep():
    call_command("process_spark_sources", "challenges.Challenge", stdout=io.StringIO())


WAYS = {
    "emit": lambda: emit("g", "new", n=1),
    "emit with order": lambda: emit("g", "new", ordering_key="o"),
    "raise": lambda: emit("g", "new", on_duplicate="raise"),
    "check": lambda: emit("g", "new", on_duplicate="check"),
    "emit_many": lambda: emit_many({"group": "g", "key": f"new {n}"} for n in range(4)),
    "some of emit_many": lambda: emit_many({"group": "g", "key": f"new {n}"} for n in range(9)),
    "aemit_many": lambda: async_to_sync(aemit_many)([{"group": "g", "key": "new"}]),
    "save": lambda: Challenge.objects.get().save(),
}


@pytest.fixture
def challenge_without_event():
    make_challenge()
    OutboxEvent.objects.all().delete()


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "autocommit"])
@pytest.mark.parametrize("way", WAYS)
def test_an_id_that_is_taken_is_an_error_that_names_the_cure(
    challenge_without_event, lagging, way, atomic
):
    before = keys_by_id()

    def attempt():
        if atomic:
            with transaction.atomic():
                return WAYS[way]()
        return WAYS[way]()

    with pytest.raises(IdCollision, match="setval") as caught:
        attempt()
    assert CURE in str(caught.value)
    assert "new" in str(caught.value) or "challenge_created" in str(caught.value)
    assert keys_by_id() == before
    execute(CURE)
    attempt()
    assert len(keys_by_id()) > len(before)


def test_a_sweep_that_meets_an_id_that_is_taken_says_so(challenge_without_event, lagging):
    with pytest.raises(CommandError, match="setval"):
        sweep()
    execute(CURE)
    sweep()
    assert keys_by_id()[-1].startswith("challenge_created")


def test_spark_emit_raises_for_an_id_that_is_taken(lagging):
    with pytest.raises(IntegrityError, match="another event has its id") as caught:
        execute("select spark_emit('g', 'new')")
    assert isinstance(caught.value.__cause__, UniqueViolation)
    assert CURE in caught.value.__cause__.diag.message_hint
    execute(CURE)
    assert execute("select spark_emit('g', 'new')")


def test_a_transaction_that_lost_an_event_cannot_be_committed(lagging):
    callbacks = []
    with transaction.atomic():
        Handled.objects.create(key="business")
        transaction.on_commit(lambda: callbacks.append("committed"))
        with pytest.raises(IdCollision):
            emit("g", "new")
    assert handled() == []
    assert callbacks == []


def test_a_duplicate_is_one_also_while_the_sequence_lags(lagging):
    assert emit("g", "old 0") is None
    lagging()
    with pytest.raises(DuplicateKey, match="already"):
        emit("g", "old 0", on_duplicate="raise")
    lagging()
    assert emit("g", "old 0", on_duplicate="check") is None
    lagging()
    with pytest.raises(DuplicateKey, match="another group or payload"):
        emit("g", "old 0", n=1, on_duplicate="check")
    lagging()
    assert emit_many({"group": "g", "key": f"old {number}"} for number in range(5)) == 0
    lagging()
    assert execute("select spark_emit('g', 'old 3')") is None


def test_only_duplicates_cost_a_second_statement():
    events = [{"group": "g", "key": f"bulk {number}"} for number in range(20)]
    connection.ensure_connection()
    for act, first, again in (
        (lambda: emit("g", "key"), 1, 2),
        (lambda: emit("g", "another", on_duplicate="check"), 1, 2),
        (lambda: emit_many(events, chunk_size=10), 2, 2),
    ):
        for expected in (first, again):
            with Statements() as statements:
                act()
            assert len(statements.sql) == expected, statements.sql


def isolate(level):
    """Begin the transaction at this level, with its first snapshot."""
    with connection.cursor() as cursor:
        cursor.execute(f"set transaction isolation level {level}")
    execute("select 1")


@pytest.mark.parametrize("many", [False, True], ids=["emit", "emit_many"])
@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_a_key_that_another_transaction_commits_meanwhile_is_a_duplicate(isolation, many):
    """Under the levels with one snapshot for all PostgreSQL itself refuses what it can't see."""
    outcome = []

    def attempt():
        try:
            with transaction.atomic():
                isolate(isolation)
                started.set()
                assert emitted.wait(PATIENCE)
                outcome.append(emit_many([{"group": "g", "key": "key"}]) if many else emit("g", "key"))
        except OperationalError as error:
            outcome.append(error)
        finally:
            connections.close_all()

    started, emitted = threading.Event(), threading.Event()
    thread = threading.Thread(target=attempt)
    thread.start()
    assert started.wait(PATIENCE)
    with connect() as other:
        other.execute("begin")
        other.execute("insert into spark_outbox_event (key, event_group) values ('key', 'g')")
        emitted.set()
        with connect() as looker:
            eventually(
                lambda: looker.execute(
                    "select 1 from pg_stat_activity where wait_event_type = 'Lock' and datname = "
                    "current_database() and query ~ 'spark_outbox' and pid <> pg_backend_pid()"
                ).fetchone()
            )
        other.execute("commit")
    thread.join(PATIENCE)
    if isolation == "read committed":
        assert outcome == [0 if many else None]
    else:
        assert isinstance(outcome[0].__cause__, SerializationFailure)


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_a_key_that_the_snapshot_shows_is_a_duplicate_under_every_isolation_level(isolation):
    emit("g", "key")
    with transaction.atomic():
        isolate(isolation)
        emit("g", "mine")
        assert emit("g", "key") is None
        assert emit("g", "mine") is None
        assert emit_many([{"group": "g", "key": "key"}, {"group": "g", "key": "mine"}]) == 0


def test_a_handler_that_meets_an_id_that_is_taken_is_tried_again(own_registry, lagging):
    @handler("^start$", name="h", backoff=0.001)
    def emits(event):
        if event.attempt > 1:
            execute(CURE)
        else:
            lagging()
        emit("g", "new")

    own_registry.add_handler(note, group="^g$", name="note")
    execute(CURE)
    emit("start", "start")
    eventually(lambda: Worker().drain() == 0 and "new" in handled())


# What `check --database` finds


@pytest.mark.parametrize(
    ("last", "is_called", "behind"),
    [("max", "true", False), ("max", "false", True), ("max + 1", "false", False), ("1", "true", True)],
)
def test_check_finds_a_sequence_that_is_behind_the_table(last, is_called, behind):
    for number in range(5):
        emit("probe", f"{number}")
    execute(
        "select setval(pg_get_serial_sequence('spark_outbox_event', 'id'), "
        f"(select {last} from (select max(id) from spark_outbox_event) as highest), {is_called})"
    )
    try:
        found = checks.check_databases(databases=["default"])
        assert [(error.id, error.hint) for error in found] == (
            [("spark_outbox.E007", f"Run as the owner of the table: {CURE}")] if behind else []
        )
    finally:
        execute(CURE)


def test_check_finds_nothing_in_an_empty_table():
    assert checks.check_databases(databases=["default"]) == []
