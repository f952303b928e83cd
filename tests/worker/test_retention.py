"""Retention: what is pruned, what of it stays, and that nobody waits for it."""

import datetime as dt
import re
import threading

import pytest
from django.db import connection, transaction
from psycopg.errors import CheckViolation, InvalidParameterValue

from spark_outbox import conf, emit, emit_many, handler
from spark_outbox.errors import DuplicateKey
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.operating.replay import Selection
from spark_outbox.store import pruning
from spark_outbox.worker import retention
from spark_outbox.worker.loop import Worker
from tests.tools import (
    HOUR,
    Clock,
    connect,
    eventually,
    status,
    statuses,
    wait_until_asleep,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)

DAY = 86_400


def end(key, *, days, status="done"):
    """Let an event have ended so many days ago."""
    with connect() as other:
        other.execute(
            "update spark_outbox_event set status = %s, finished_at = now() - make_interval(days => %s) "
            "where key = %s",
            [status, days, key],
        )


def prune_all():
    """Prune what is due; return how many events."""
    chunks = retention.Chunks(seconds=1, using="default")
    portions = retention.due(conf.current().RETENTION, using="default")
    return sum(each.total for portion in portions for each in chunks.prune(portion))


@pytest.fixture
def soon(monkeypatch):
    """Workers look for what they may prune at once, and often."""
    monkeypatch.setattr(retention, "FIRST_LOOK", (0, 0))
    monkeypatch.setattr(retention, "LOOK_INTERVAL", 0.05)


@pytest.fixture
def slow(monkeypatch):
    """It takes workers a long time."""
    monkeypatch.setattr(retention.Chunks, "SMALLEST", 10)
    monkeypatch.setattr(retention.Chunks, "LARGEST", 10)


# What is pruned


def test_a_key_that_was_chosen_stays_and_one_that_was_made_up_goes():
    emit("g", "chosen", number=1)
    emit("g", "in order", ordering_key="o", headers={"trace": 1}, number=1)
    made_up = [emit("g", number=1).key, emit("g", delay=1).key]
    emit_many([{"group": "g", "key": "chosen too"}, {"group": "g"}, {"group": "g", "ordering_key": "o"}])
    with connect() as other:
        other.execute("select spark_emit('g', null), spark_emit('g', 'by sql')")
        made_up += [key for (key,) in other.execute("select key from spark_outbox_event where id > 5")]
    for key in statuses():
        end(key, days=15)
    assert prune_all() == 9
    assert set(statuses()) == {"chosen", "in order", "chosen too", "by sql"}
    for event in OutboxEvent.objects.all():
        assert (event.payload, event.headers, event.ordering_key) == ({}, {}, None)
        assert event.digest is not None
        assert event.finished_at is not None
    assert prune_all() == 0


def test_a_pruned_key_is_a_duplicate_for_ever():
    emit("g", "key", number=1, text="x")
    end("key", days=15)
    assert prune_all() == 1
    assert emit("g", "key", number=1, text="x") is None
    assert emit("g", "key", number=1, text="x", on_duplicate="check") is None
    assert emit("g", "key", number=1.0, text="x", on_duplicate="check") is None  # equal as jsonb
    assert emit_many([{"group": "g", "key": "key"}]) == 0
    for other in ({"number": 2, "text": "x"}, {"number": 1}, {}):
        with pytest.raises(DuplicateKey), transaction.atomic():
            emit("g", "key", on_duplicate="check", **other)
    with pytest.raises(DuplicateKey), transaction.atomic():
        emit("other", "key", on_duplicate="check", number=1, text="x")
    assert statuses() == {"key": "done"}


def test_deliveries_go_with_their_events():
    emit("g", "stripped")
    deleted = emit("g")
    for event in OutboxEvent.objects.all():
        Delivery.objects.create(event=event, handler="h", status="done")
        end(event.key, days=15)
    emit("g", "stays")
    Delivery.objects.create(event=OutboxEvent.objects.get(key="stays"), handler="h", status="done")
    prune_all()
    assert not OutboxEvent.objects.filter(pk=deleted.id).exists()
    assert [delivery.event.key for delivery in Delivery.objects.all()] == ["stays"]


def test_each_state_and_group_has_its_time(settings):
    settings.SPARK_OUTBOX = {
        "RETENTION": {
            "done": dt.timedelta(days=2),
            "failed": dt.timedelta(days=5),
            "groups": {"^audit": None, "^ping": HOUR, "^order": {"failed": None}},
        }
    }
    for group in ("audit", "ping", "order", "other"):
        for state in conf.FINAL_STATES:
            emit(group, f"{group} {state}")
            end(f"{group} {state}", days=4, status=state)
        emit(group, f"{group} pending")
    assert prune_all() == 6
    pruned = OutboxEvent.objects.filter(digest__isnull=False).values_list("key", "status")
    assert dict(pruned) == {
        "ping done": "done",
        "ping failed": "discarded",
        "ping unhandled": "discarded",
        "ping discarded": "discarded",
        "order done": "done",
        "other done": "done",
    }
    end("order failed", days=6, status="failed")
    end("other failed", days=6, status="failed")
    assert prune_all() == 1
    assert statuses()["other failed"] == "discarded"
    assert statuses()["order failed"] == "failed"


def test_by_default_failed_and_unhandled_events_stay(settings):
    settings.SPARK_OUTBOX = {}
    for state in conf.FINAL_STATES:
        emit("g", state)
        end(state, days=13, status=state)
    assert prune_all() == 0
    for state in conf.FINAL_STATES:
        end(state, days=15, status=state)
    assert prune_all() == 2
    assert OutboxEvent.objects.filter(digest__isnull=True).count() == 2
    settings.SPARK_OUTBOX = {"RETENTION": None}
    assert retention.due(conf.current().RETENTION, using="default") == []


def test_what_sql_has_ended_without_saying_when_counts_from_when_it_is_seen():
    emit("g", "key", number=1)
    with connect() as other:
        other.execute(
            "update spark_outbox_event set status = 'done', created_at = now() - interval '1 year'"
        )
        assert prune_all() == 0
        event = OutboxEvent.objects.get()
        assert event.payload == {"number": 1}
        assert event.finished_at is not None
        end("key", days=15)
        assert prune_all() == 1


@pytest.mark.parametrize("time", ["-infinity", "infinity", "0044-03-15 BC"])
def test_no_time_that_sql_can_write_stops_it(time):
    for key in ("odd", "old"):
        emit("g", key)
        end(key, days=15)
    with connect() as other:
        other.execute("update spark_outbox_event set finished_at = %s where key = 'odd'", [time])
    assert prune_all() == (1 if time == "infinity" else 2)


def test_a_failed_head_that_is_pruned_lets_its_order_go_on(own_registry, settings):
    settings.SPARK_OUTBOX = {"RETENTION": {"failed": DAY}}
    seen = []
    own_registry.add_handler(lambda event: seen.append(event.key), group="", name="h")
    for key in ("first", "second"):
        emit("g", key, ordering_key="o")
    end("first", days=2, status="failed")
    assert Worker().drain() == 0
    prune_all()
    assert Worker().drain() == 1
    assert seen == ["second"]


# What others hold, and what would make it worse


def test_rows_that_somebody_holds_are_passed_over():
    for key in ("held", "free"):
        emit("g", key)
        end(key, days=15)
    with connect(autocommit=False) as other:
        other.execute("select id from spark_outbox_event where key = 'held' for key share")
        assert prune_all() == 1
    assert prune_all() == 1


def test_an_event_whose_delivery_somebody_holds_is_passed_over():
    for key in ("held", "free"):
        emit("g", key)
        end(key, days=15)
        Delivery.objects.create(event=OutboxEvent.objects.get(key=key), handler="h", status="done")
    with connect(autocommit=False) as other:
        other.execute(
            "update spark_outbox_delivery set error = 'x' "
            "where event_id = (select id from spark_outbox_event where key = 'held')"
        )
        assert prune_all() == 1
    assert prune_all() == 1


def test_an_event_that_becomes_pending_meanwhile_stays_whole():
    with connect() as other:
        other.execute(
            "insert into spark_outbox_event (key, event_group, payload, status, finished_at) "
            "select number, 'g', '{\"n\": 1}', 'done', now() - interval '15 days' "
            "from generate_series(1, 1000) as number"
        )
        refused = 0

        def reopen():
            nonlocal refused
            for key in range(1000, 0, -1):
                try:
                    other.execute(
                        "update spark_outbox_event set status = 'pending' where key = %s", [str(key)]
                    )
                except CheckViolation:
                    refused += 1

        thread = threading.Thread(target=reopen)
        thread.start()
        while thread.is_alive():
            pruning.prune("done", "g", seconds=DAY, most=3, using="default")
        thread.join()
    whole = OutboxEvent.objects.filter(status="pending", digest=None, payload={"n": 1}).count()
    stripped = OutboxEvent.objects.filter(status="done", digest__isnull=False, payload={}).count()
    assert (whole, stripped) == (1000 - refused, refused)
    assert 0 < refused < 1000


def test_one_prunes_at_a_time():
    emit("g", "key")
    end("key", days=15)
    with connect(autocommit=False) as other:
        other.execute("select pg_advisory_xact_lock(7531004, 'spark_outbox_event'::regclass::oid::int)")
        assert pruning.prune("done", "g", seconds=1, most=10, using="default") is None
        assert pruning.forget_keys(0, seconds=1, most=10, using="default") is None
        assert prune_all() == 0
    assert prune_all() == 1


@pytest.mark.parametrize(
    "rule",
    [
        "deferrable initially deferred",  # as Django's are
        "on delete cascade",
        "on delete set null",
        "on delete restrict",
    ],
)
def test_what_a_table_of_the_project_refers_to_is_stripped_and_nothing_else(rule):
    referred = emit("g")
    emit_many({"group": "g"} for _ in range(5))
    for key in statuses():
        end(key, days=15)
    with connect() as other:
        other.execute(f"create table refers (event_id bigint references spark_outbox_event (id) {rule})")
        try:
            other.execute("insert into refers values (%s)", [referred.id])
            assert prune_all() == 6
            assert OutboxEvent.objects.get().digest is not None
            other.execute("update spark_outbox_event set created_at = now() - interval '9 days'")
            chunks = retention.Chunks(seconds=1, using="default")
            assert sum(each.total for each in chunks.forget_keys(8 * DAY)) == 0
            assert OutboxEvent.objects.get().id == referred.id
            assert other.execute("select event_id from refers").fetchone() == (referred.id,)
        finally:
            other.execute("drop table refers")


def test_the_functions_run_nothing_of_their_callers_with_their_owner_s_rights():
    """Up to PostgreSQL 17, SET CONSTRAINTS would run deferred triggers of the caller."""
    emit("g", "key")
    end("key", days=15)
    with connect() as other:
        other.execute("create role spark_test_mallory; grant spark_test_mallory to current_user")
        try:
            other.execute(
                "grant execute on function spark_outbox_prune to spark_test_mallory;"
                "set role spark_test_mallory;"
                "create temp table seen (who text);"
                "create temp table t (a int);"
                "create function pg_temp.look() returns trigger language plpgsql as "
                "$$ begin insert into pg_temp.seen values (current_user); return null; end $$;"
                "create constraint trigger x after insert on t deferrable initially deferred "
                "for each row execute function pg_temp.look()"
            )
            with other.transaction():
                other.execute("insert into t values (1)")
                other.execute("select spark_outbox_prune('spark_outbox_event', 'done', 'g', now(), 10)")
                assert other.execute("select * from seen").fetchall() == []
            assert other.execute("select * from seen").fetchall() == [("spark_test_mallory",)]
            other.execute("reset role")
            other.execute("drop table t, seen")
        finally:
            other.execute("reset role; drop owned by spark_test_mallory; drop role spark_test_mallory")


def test_what_is_put_into_the_outboxs_schema_is_not_run_with_the_owner_s_rights():
    emit("g", "key")
    end("key", days=15)
    with connect() as other:
        traps = {
            "format(text, text)": "text",
            "format(text, name, regclass, name)": "text",
            "array_cat(bigint[], bigint[])": "bigint[]",
            "unnest(text[])": "setof text",
            "cardinality(text[])": "integer",
        }
        for trap, kind in traps.items():
            other.execute(
                f"create function public.{trap} returns {kind} language plpgsql as "
                "$$ begin raise exception 'trapped'; end $$"
            )
        try:
            assert prune_all() == 1
            assert emit_many([{"group": "g", "key": "key"}]) == 0
        finally:
            for trap in traps:
                other.execute(f"drop function public.{trap}")


@pytest.mark.parametrize("state", ["pending", "running", "", "x' or true --"])
def test_nothing_else_than_what_has_ended_can_be_pruned(state):
    with connect() as other, pytest.raises(InvalidParameterValue):
        other.execute("select spark_outbox_prune('spark_outbox_event', %s, 'g', now(), 10)", [state])


@pytest.mark.parametrize("state", ["pending", "running", "failed", "unhandled"])
def test_a_pruned_event_can_not_be_made_ready_again(state):
    emit("g", "key", number=1)
    end("key", days=15)
    prune_all()
    sentence = f"has been pruned and can't become {state}: of its payload nothing is left"
    with connect() as other:
        with pytest.raises(CheckViolation, match=sentence):
            other.execute("update spark_outbox_event set status = %s", [state])
        other.execute("update spark_outbox_event set status = 'discarded'")


def test_a_pruned_event_is_not_replayed(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    emit("g", "key")
    end("key", days=15)
    prune_all()
    selection = Selection(handler=own_registry.handlers[0], keys=("key",))
    assert list(selection.ids(using="default")) == []
    assert selection.left_out(using="default") == {
        "key": "it was pruned: of its payload nothing is left."
    }


# Keys


def test_keys_are_forgotten_if_somebody_says_so():
    for key in ("old", "new", "whole"):
        emit("g", key)
        end(key, days=15)
    with connect() as other:
        other.execute("update spark_outbox_event set finished_at = now() where key = 'whole'")
        prune_all()
        other.execute(
            "update spark_outbox_event set created_at = now() - interval '9 days' where key <> 'new'"
        )
    chunks = retention.Chunks(seconds=1, using="default")
    assert sum(each.total for each in chunks.forget_keys(8 * DAY)) == 1
    assert set(statuses()) == {"new", "whole"}
    assert emit("g", "old") is not None


def test_the_keys_are_read_to_the_first_piece_of_which_none_is_old(monkeypatch):
    monkeypatch.setattr(retention, "KEYS_PIECE", 1)
    monkeypatch.setattr(retention.Chunks, "SMALLEST", 10)
    monkeypatch.setattr(retention.Chunks, "LARGEST", 10)
    with connect() as other:
        other.execute(
            "insert into spark_outbox_event (key, event_group, status, digest, created_at) "
            "select number, 'g', 'done', 1, now() - make_interval(days => 100 - number) "
            "from generate_series(1, 100) as number"
        )
    chunks = retention.Chunks(seconds=1, using="default")
    found = [each.total for each in chunks.forget_keys(75.5 * DAY)]
    assert found == [10, 10, 4, 0]
    assert OutboxEvent.objects.count() == 76


# Workers


def test_a_sleeping_worker_prunes(soon, caplog):
    caplog.set_level("INFO")
    emit_many({"group": "g", "key": f"key {number}"} for number in range(500))
    with connect() as other:
        other.execute(
            "update spark_outbox_event set status = 'done', finished_at = now() - interval '15 days'"
        )
    with worker_thread():
        eventually(lambda: not OutboxEvent.objects.filter(digest__isnull=True).exists())
        eventually(lambda: "Pruned 500 events." in caplog.text)
        wait_until_asleep()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_worker_that_is_always_busy_prunes_as_well(soon, own_registry):
    def handle(event):
        emit("g", f"{int(event.key) + 1}")

    own_registry.add_handler(handle, group="", name="h")
    emit("other", "old")
    end("old", days=15)
    emit("g", "0")
    with worker_thread():
        eventually(lambda: OutboxEvent.objects.get(key="old").digest is not None)


def test_events_are_handled_while_a_worker_prunes(soon, slow, own_registry):
    """It looks after each chunk."""
    own_registry.add_handler(lambda event: None, group="live", name="h")
    with connect() as other:
        other.execute(
            "insert into spark_outbox_event (key, event_group, status, finished_at) "
            "select number, 'g', 'done', now() - interval '15 days' "
            "from generate_series(1, 20000) as number"
        )
        with worker_thread():
            eventually(lambda: OutboxEvent.objects.filter(digest__isnull=False).exists())
            for number in range(20):
                emit("live", f"live {number}")
                eventually(
                    lambda key=f"live {number}": OutboxEvent.objects.get(key=key).status == "done"
                )
            assert OutboxEvent.objects.filter(group="g", digest__isnull=True).exists()


def test_pruning_waits_while_an_old_snapshot_is_held_and_names_who_holds_it(soon, monkeypatch, caplog):
    monkeypatch.setattr(retention, "PATIENCE", 0)
    emit("g", "key")
    end("key", days=15)
    with connect(autocommit=False, application_name="a report") as other:
        other.execute("set transaction isolation level repeatable read")
        other.execute("select count(*) from spark_outbox_event")
        pid = other.info.backend_pid
        with worker_thread():
            name = re.compile(rf"Nothing is pruned: session {pid} \(.*a report.*\) holds a snapshot")
            eventually(lambda: name.search(caplog.text))
            assert OutboxEvent.objects.get().digest is None
            other.rollback()
            eventually(lambda: OutboxEvent.objects.get().digest is not None)


def test_a_worker_forgets_keys_by_a_setting(soon, settings):
    settings.SPARK_OUTBOX = {"KEYS_RETENTION": dt.timedelta(days=30)}
    emit("g", "key")
    end("key", days=31)
    with connect() as other:
        other.execute("update spark_outbox_event set created_at = now() - interval '31 days'")
    with worker_thread():
        eventually(lambda: not OutboxEvent.objects.exists())


def test_a_refusal_is_logged_and_the_worker_goes_on(soon, own_registry, caplog):
    own_registry.add_handler(lambda event: None, group="live", name="h")
    emit("g", "key")
    end("key", days=15)
    with connect() as other:
        other.execute(
            "create function refuse() returns trigger language plpgsql as "
            "$$ begin raise exception 'not this one'; end $$;"
            "create trigger refuse before update on spark_outbox_event "
            "for each row when (new.digest is not null) execute function refuse()"
        )
        try:
            with worker_thread():
                eventually(lambda: "Events can't be pruned (ProgrammingError P0001)" in caplog.text)
                emit("live", "live")
                eventually(lambda: status("live") == "done")
                other.execute("drop trigger refuse on spark_outbox_event")
                eventually(lambda: OutboxEvent.objects.get(key="key").digest is not None)
        finally:
            other.execute("drop function refuse cascade")


def test_a_refusal_ends_its_group_alone(soon, caplog):
    for key in ("a", "b", "c"):
        emit(key, key)
        end(key, days=15)
    with connect() as other:
        other.execute(
            "create function refuse() returns trigger language plpgsql as "
            "$$ begin raise exception 'not this one'; end $$;"
            "create trigger refuse before update on spark_outbox_event "
            "for each row when (new.digest is not null and new.key = 'b') execute function refuse()"
        )
        try:
            with worker_thread():
                eventually(lambda: OutboxEvent.objects.filter(digest__isnull=False).count() == 2)
        finally:
            other.execute("drop function refuse cascade")
    assert OutboxEvent.objects.get(digest=None).key == "b"


def test_chunks_grow_only_while_they_are_full(monkeypatch):
    """A quick chunk of few events says nothing about one of many."""
    sizes, left = [], {"small": 3, "large": 10_000}

    def prune(state, group, *, seconds, most, using):
        sizes.append((group, most))
        done = min(most, left[group])
        left[group] -= done
        clock.now += done / 1000
        return pruning.Pruned(done, 0)

    monkeypatch.setattr(pruning, "prune", prune)
    monkeypatch.setattr(retention, "held_up", lambda **_: None)
    clock = Clock()
    chunks = retention.Chunks(seconds=0.4, using="default", clock=clock)
    for group in ("small", "small", "large"):
        for _ in chunks.prune(retention.Portion("done", group, 1)):
            pass
    small = retention.Chunks.SMALLEST
    assert sizes[:2] == [("small", small), ("small", small)]
    assert [size for group, size in sizes[2:6]] == [small, 100, 200, 400]
    assert max(size for _, size in sizes) <= 400


def test_a_detached_handler_whose_worker_died_is_taken_over_while_another_prunes(
    soon, slow, own_registry
):
    handler("^d", name="h", atomic=False)(lambda event: None)
    emit("d", "key")
    with connect() as other:
        other.execute(
            "insert into spark_outbox_event (key, event_group, status, finished_at) "
            "select 'old ' || number, 'g', 'done', now() - interval '15 days' "
            "from generate_series(1, 30000) as number"
        )
        with worker_thread():
            eventually(lambda: OutboxEvent.objects.filter(digest__isnull=False).exists())
            other.execute(
                "update spark_outbox_event set status = 'running', finished_at = null where key = 'key';"
                "insert into spark_outbox_delivery (event_id, handler, status, session) "
                "select id, 'h', 'running', 5 from spark_outbox_event where key = 'key' "
                "on conflict (event_id, handler) do update set status = 'running', session = 5"
            )
            eventually(lambda: status("key") == "done")
            assert OutboxEvent.objects.filter(group="g", digest__isnull=True).exists()


def test_a_worker_outlives_an_outbox_that_can_not_prune(soon, own_registry, monkeypatch):
    monkeypatch.setattr(retention, "LOOK_INTERVAL", HOUR)
    own_registry.add_handler(lambda event: None, group="live", name="h")
    emit("g", "key")
    end("key", days=15)
    with connect() as other:
        other.execute("alter function spark_outbox_prune rename to away")
        try:
            with worker_thread():
                for number in range(3):
                    emit("live", f"live {number}")
                    eventually(lambda key=f"live {number}": status(key) == "done")
        finally:
            other.execute("alter function away rename to spark_outbox_prune")


def test_a_drain_leaves_pruning_to_others(soon):
    emit("g", "key")
    end("key", days=15)
    Worker().run(drain=True)
    assert OutboxEvent.objects.get().digest is None


# Plans


def test_pruning_reads_no_more_than_it_prunes():
    """Not what was pruned before, nor what is kept: however many these are."""
    with connect() as other:
        for group, days, digest in (("g", 15, "null"), ("g", 15, "1"), ("g", 1, "null")):
            other.execute(
                "insert into spark_outbox_event (key, event_group, status, finished_at, digest) "
                f"select gen_random_uuid(), %s, 'done', now() - make_interval(days => %s), {digest} "
                "from generate_series(1, 20000)",
                [group, days],
            )
        other.execute("vacuum analyze spark_outbox_event")
    read = (
        "select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables "
        "where relname = 'spark_outbox_event'"
    )
    with transaction.atomic(), connection.cursor() as cursor:
        assert pruning.oldest(["done"], using="default")[0].group == "g"
        assert pruning.prune("done", "g", seconds=14 * DAY, most=100, using="default").total == 100
        cursor.execute(read)
        assert cursor.fetchone()[0] < 500
