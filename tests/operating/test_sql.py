"""The SQL that people type: the views, and the functions that repair and explain."""

import datetime as dt
import threading

import pytest
from psycopg.errors import CheckViolation, InvalidParameterValue

from spark_outbox import __version__, emit, handler
from spark_outbox.errors import Discard
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.worker.loop import Worker
from tests.tools import (
    HOUR,
    Clock,
    connect,
    deliveries,
    eventually,
    make_due,
    status,
    statuses,
    wait_until_asleep,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


def run(sql, params=None):
    """Run a statement as `psql` would; return its rows as dicts, and the notices."""
    notices = []
    with connect() as session:
        session.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        cursor = session.execute(sql, params)
        names = [column.name for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()], notices


def keys(sql, *params):
    """Return the keys of the events that a function has changed, and its notices."""
    rows, notices = run(f"select * from {sql}", params)
    return [row["key"] for row in rows], notices


def names(sql, *params):
    """Return the names of the pauses that a function has changed, and its notices."""
    rows, notices = run(f"select * from {sql}", params)
    return [row["name"] for row in rows], notices


def explain(key):
    rows, _ = run("select spark_explain(%s) as sentence", [key])
    return "\n".join(row["sentence"] for row in rows)


@pytest.fixture
def failing(own_registry):
    """A handler that fails for good on each event whose payload says how, and another that does not."""
    calls = []

    def handle(event):
        calls.append(event.key)
        if event.get("error"):
            raise ValueError(event.error)

    handler("", name="failing", max_attempts=1)(handle)
    own_registry.add_handler(lambda event: None, group="", name="other")
    return calls


# Views


def test_the_status_counts_by_group(own_registry):
    for key in ("a1", "a2", "a3"):
        emit("a", key)
    emit("a", "ordered", ordering_key="o")
    emit("a", "later", delay=HOUR)
    emit("a", "ordered later", delay=HOUR, ordering_key="o")
    emit("a", "due", delay=-60)
    emit("a", "retried", delay=HOUR)
    OutboxEvent.objects.filter(key="retried").update(attempts=2)
    for state in ("running", "failed", "unhandled", "done", "discarded"):
        emit("b", state)
        OutboxEvent.objects.filter(key=state).update(status=state, finished_at=dt.datetime.now(dt.UTC))
    emit("c", "long ago")
    old = dt.datetime.now(dt.UTC) - dt.timedelta(hours=2)
    OutboxEvent.objects.filter(key="long ago").update(status="done", finished_at=old)
    rows, _ = run("select * from spark_outbox_status")
    a, b, c = rows
    ages = [a.pop("late"), a.pop("oldest_pending_age")]
    nothing = dict.fromkeys(("delayed", "retrying", "running", "failed", "unhandled"), 0)
    nothing |= {"ready": 0, "done_last_hour": 0, "waits_for_circuit": 0, "paused": 0, "more": False}
    assert a == {**nothing, "event_group": "a", "ready": 5, "delayed": 2, "retrying": 1}
    assert dt.timedelta(seconds=60) <= ages[0] < dt.timedelta(seconds=90)
    assert dt.timedelta(0) < ages[1] < dt.timedelta(seconds=30)
    ended = {"running": 1, "failed": 1, "unhandled": 1, "done_last_hour": 1}
    none = {"late": None, "oldest_pending_age": None}
    assert b == {**nothing, **ended, **none, "event_group": "b"}
    assert c == {**nothing, **none, "event_group": "c"}


@pytest.mark.parametrize("column", ["available_at", "created_at", "finished_at"])
@pytest.mark.parametrize("time", ["-infinity", "infinity", "0044-03-15 BC", "200000-01-01"])
@pytest.mark.parametrize("state", ["pending", "done", "failed"])
def test_the_views_bear_whatever_times_there_are(column, time, state):
    with connect() as other:
        other.execute(
            f"insert into spark_outbox_event (key, event_group, status, {column}) "
            "values ('key', 'g', %s, %s)",
            [state, time],
        )
        for view in ("status", "pauses", "failures", "workers", "snapshots", "health", "events"):
            other.execute(f"select seen::text from spark_outbox_{view} as seen").fetchall()
        other.execute("select spark_explain('key')").fetchall()


# Pauses


def test_a_pause_is_shown_everywhere(failing):
    paused, notices = run("select * from spark_pause('handler', 'failing', 'its server moves')")
    assert notices == ["No worker that can be seen has a handler 'failing'. It is paused all the same."]
    assert (paused[0]["kind"], paused[0]["name"]) == ("handler", "failing")
    names("spark_pause('group', 'b')")
    for group in ("a", "b", "c"):
        emit(group, group)
    assert "Its group b is paused since" in explain("b")  # though no worker has come to it yet
    Worker().drain()
    assert deliveries_of("a") == {"failing": "pending", "other": "done"}
    assert deliveries_of("b") == {"failing": "pending", "other": "pending"}
    rows, _ = run("select kind, name, why, waiting from spark_outbox_pauses")
    assert [tuple(row.values()) for row in rows] == [
        ("handler", "failing", "its server moves", 2),
        ("group", "b", "", 1),
    ]
    rows, _ = run("select event_group, paused, waits_for_circuit from spark_outbox_status")
    assert [tuple(row.values()) for row in rows] == [("a", 1, 0), ("b", 1, 0), ("c", 1, 0)]
    assert run("select * from spark_outbox_failures")[0] == []
    said = explain("a")
    assert "The handler failing is paused since" in said
    assert ": its server moves. It goes on after select spark_resume('handler', 'failing')" in said
    assert "9999" not in said
    assert "has failed" not in said
    rows, _ = run("select * from spark_outbox_health where name = 'pauses'")
    assert rows[0]["status"] == "warning"
    assert "The handler failing is paused since" in rows[0]["detail"]
    assert ": its server moves; 2 events wait for it. The group b is paused" in rows[0]["detail"]
    assert names("spark_pause('group', 'b')") == ([], ["The group 'b' is paused already."])
    for kind, name in (("handler", "failing"), ("group", "b")):
        assert [row["name"] for row in run(f"select * from spark_resume('{kind}', '{name}')")[0]] == [
            name
        ]
    assert names("spark_resume('group', 'b')") == ([], ["The group 'b' is not paused."])
    assert health()["pauses"] == "ok"


def deliveries_of(key):
    return dict(Delivery.objects.filter(event__key=key).values_list("handler", "status"))


@pytest.mark.parametrize("function", ["spark_pause", "spark_resume"])
def test_a_pause_of_no_known_kind_is_refused_with_the_cure(function):
    with pytest.raises(InvalidParameterValue, match="no pauses of the kind 'grup'") as refused:
        names(f"{function}('grup', 'g')")
    assert "Write 'handler'" in refused.value.diag.message_hint


def test_what_has_waited_for_a_pause_that_is_over_is_explained(failing):
    names("spark_pause('handler', 'failing')")
    emit("a", "key")
    Worker().drain()
    with connect(autocommit=False) as other:
        other.execute("select id from spark_outbox_event for no key update")
        names("spark_resume('handler', 'failing')")
    assert "A worker puts the event back within a minute." in explain("key")


def test_failures_are_grouped_by_what_is_alike(own_registry, failing):
    errors = [
        "order 12 is bad",
        "order 4711 is bad",
        "no such user: 'anna'",
        'no such user: "bob"',
        "row 0195f2a4-6d7e-7c3a-9b1f-0242ac120002 is gone\nDETAIL: 5",
        "row 8c5b2f1e-1111-4222-8333-444455556666 is gone\nDETAIL: 6",
    ]
    for number, error in enumerate(errors):
        emit("g", f"key {number}", error=error)
    emit("g", "fine")
    Worker().drain()
    rows, _ = run("select * from spark_outbox_failures")
    assert sorted((row["handler"], row["fingerprint"], row["failed"]) for row in rows) == [
        ("failing", "builtins.ValueError: no such user: *", 2),
        ("failing", "builtins.ValueError: order # is bad", 2),
        ("failing", "builtins.ValueError: row # is gone", 2),
    ]
    for row in rows:
        assert row["first_at"] <= row["last_at"]
        assert row["retrying"] == 0
        assert row["example_key"] in statuses()


def test_workers_are_listed_with_what_they_do(own_registry, monkeypatch):
    started, go = threading.Event(), threading.Event()

    def wait(event):
        started.set()
        go.wait(30)

    own_registry.add_handler(wait, group="", name="waits")

    def state():
        (row,), _ = run("select * from spark_outbox_workers")
        return row["state"]

    assert run("select * from spark_outbox_workers")[0] == []
    with worker_thread():
        wait_until_asleep()
        (row,), _ = run("select * from spark_outbox_workers")
        assert row["state"] == "watch"
        assert row["handlers"] == ["waits"]
        assert (row["groups"], row["version"]) == (None, __version__)
        emit("g", "key")
        started.wait(30)
        assert state() == "busy"
        assert "has it in hand since" in explain("key")
        assert keys("spark_retry(%s)", "key")[1] == [
            "The event 'key' is left out: a worker has it in hand."
        ]
        go.set()
        eventually(lambda: status() == "done")
    assert run("select * from spark_outbox_workers")[0] == []
    with connect() as other:
        other.execute("insert into spark_outbox_session (session, name) values (5, 'host:77')")
        (row,), _ = run("select host, pid, state from spark_outbox_workers")
        assert row == {"host": "host", "pid": 77, "state": "gone"}


def health():
    rows, _ = run("select * from spark_outbox_health")
    assert all(row["remedy"] is not None and row["detail"].endswith(".") for row in rows)
    return {row["name"]: row["status"] for row in rows}


def test_health_says_what_is_wrong_and_what_to_do(own_registry, failing):
    own_registry.add_handler(lambda event: None, group="", name="h")
    assert health() == {
        "lag": "ok",
        "failed": "ok",
        "unhandled": "ok",
        "circuits": "ok",
        "pauses": "ok",
        "workers": "critical",
        "trigger": "ok",
        "snapshot": "ok",
        "dead rows": "ok",
        "prepared": "ok",
        "notifications": "ok",
    }
    with worker_thread():
        assert health()["workers"] == "ok"
    for key, age in (("late", 2), ("very late", 20)):
        emit("g", key)
        with connect() as other:
            other.execute(
                "update spark_outbox_event set created_at = now() - make_interval(mins => %s)", [age]
            )
        assert health()["lag"] == ("warning" if age == 2 else "critical")
    for state in ("failed", "unhandled"):
        OutboxEvent.objects.update(status=state)
        assert health()[state] == "warning"
    with connect() as other:
        other.execute("alter table spark_outbox_event disable trigger spark_outbox_wake")
        try:
            assert health()["trigger"] == "warning"
        finally:
            other.execute("alter table spark_outbox_event enable trigger spark_outbox_wake")


# Repair


def test_a_failed_event_is_retried_with_all_its_attempts(failing):
    emit("g", "key", error="bad")
    Worker().drain()
    assert deliveries() == {"failing": ("failed", 1), "other": ("done", 1)}
    OutboxEvent.objects.update(payload={})
    assert keys("spark_retry(%s)", "key") == (["key"], [])
    assert deliveries() == {"failing": ("pending", 0), "other": ("done", 1)}
    Worker().drain()
    assert status() == "done"
    assert failing == ["key", "key"]


@pytest.mark.parametrize("state", ["unhandled", "discarded", "pending"])
def test_other_events_are_retried_as_well(failing, state):
    emit("g", "key", delay=HOUR)
    OutboxEvent.objects.update(status=state)
    assert keys("spark_retry(%s)", "key") == (["key"], [])
    Worker().drain()
    assert status() == "done"


@pytest.mark.parametrize("state", ["done", "running"])
def test_what_can_not_be_retried_is_left_out_with_the_reason(failing, state):
    emit("g", "key")
    OutboxEvent.objects.update(status=state)
    assert keys("spark_retry(%s)", "key") == ([], [f"The event 'key' is left out: it is {state}."])
    assert keys("spark_retry(%s)", "no such") == ([], ["There is no event with the key 'no such'."])
    assert status() == state


def test_a_retry_wakes_a_worker(failing):
    emit("g", "key", delay=HOUR)
    OutboxEvent.objects.update(status="unhandled")
    with worker_thread():
        wait_until_asleep()
        keys("spark_retry(%s)", "key")
        eventually(lambda: status() == "done")


def test_all_that_failed_alike_is_retried(failing):
    for number in range(4):
        emit("g", f"{number}", error=f"order {number} is bad")
    emit("g", "other", error="no connection")
    Worker().drain()
    bad = "builtins.ValueError: order # is bad"
    assert keys("spark_retry_failed(fingerprint => %s, max => 2)", bad) == (["0", "1"], [])
    assert keys("spark_retry_failed('nope')") == ([], [])
    assert keys("spark_retry_failed('failing', now() + interval '1 hour')") == ([], [])
    assert keys("spark_retry_failed('failing', fingerprint => %s)", bad) == (["2", "3"], [])
    assert keys("spark_retry_failed()") == (["other"], [])
    assert set(statuses().values()) == {"pending"}


def test_only_the_handler_that_is_named_is_retried(own_registry):
    calls = []

    def fail(event):
        calls.append(event.key)
        raise ValueError

    for name in ("one", "two"):
        handler("", name=name, max_attempts=1)(fail)
    emit("g", "key")
    Worker().drain()
    assert keys("spark_retry_failed('one')") == (["key"], [])
    assert deliveries() == {"one": ("pending", 0), "two": ("failed", 1)}
    Worker().drain()
    assert len(calls) == 3
    assert status() == "failed"


@pytest.mark.parametrize("state", ["pending", "failed", "unhandled"])
def test_an_event_is_given_up_with_a_reason(failing, state):
    emit("g", "key", error="bad")
    if state == "failed":
        Worker().drain()
    OutboxEvent.objects.update(status=state)
    assert keys("spark_discard(%s, %s)", "key", "a test order") == (["key"], [])
    event = OutboxEvent.objects.get()
    assert event.status == "discarded"
    assert event.last_error.startswith("Discarded by ")
    assert event.last_error.endswith(": a test order")
    assert "a test order" in explain("key")
    assert not Delivery.objects.filter(status__in=["pending", "failed"]).exists()
    Worker().drain()
    assert status() == "discarded"


def test_what_comes_after_an_event_that_is_given_up_goes_on(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    for key in ("first", "second"):
        emit("g", key, ordering_key="o")
    OutboxEvent.objects.filter(key="first").update(status="failed")
    assert "comes after the event 'first' of its ordering key, which is failed" in explain("second")
    with worker_thread():
        wait_until_asleep()
        keys("spark_discard(%s, %s)", "first", "no more")
        eventually(lambda: status("second") == "done")


def test_an_event_is_replayed_to_one_handler(failing, own_registry):
    calls = []
    own_registry.add_handler(lambda event: calls.append(event.key), group="", name="new")
    emit("g", "key")
    Worker().drain()
    for times in (2, 3):
        assert keys("spark_replay(%s, %s)", "key", "new") == (["key"], [])
        Worker().drain()
        assert status() == "done"
        assert (len(calls), len(failing)) == (times, 1)
    emit("g", "pending")
    assert keys("spark_replay(%s, %s)", "pending", "new")[1] == [
        "The event 'pending' is left out: it is pending."
    ]


def test_a_replay_of_what_sql_has_ended_calls_no_other_handler(failing, own_registry):
    calls = []
    own_registry.add_handler(lambda event: calls.append(event.key), group="", name="new")
    emit("g", "key")
    OutboxEvent.objects.update(status="done")
    keys("spark_replay(%s, %s)", "key", "new")
    Worker().drain()
    assert (calls, failing) == (["key"], [])
    assert set(Delivery.objects.values_list("status", flat=True)) == {"done"}


def test_a_replay_to_nobody_is_refused(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="new")
    emit("g", "key")
    with worker_thread():
        eventually(lambda: status() == "done")
        for name in ("nwe", "*", None):
            with pytest.raises(InvalidParameterValue, match="No worker has a handler"):
                keys("spark_replay(%s, %s)", "key", name)
    assert status() == "done"


def test_a_retry_leaves_what_a_handler_has_given_up(own_registry):
    def give_up(event):
        raise Discard

    def fail(event):
        raise ValueError

    own_registry.add_handler(give_up, group="", name="gives up")
    handler("", name="fails", max_attempts=1)(fail)
    emit("g", "key")
    Worker().drain()
    keys("spark_retry(%s)", "key")
    assert deliveries() == {"gives up": ("discarded", 1), "fails": ("pending", 0)}


def test_the_lag_counts_what_could_be_handled_now(failing):
    def lag():
        rows, _ = run("select max(late) as lag from spark_outbox_status")
        return rows[0]["lag"]

    for key, order in (("head", "o"), ("behind", "o"), ("retried", None)):
        emit("g", key, ordering_key=order)
    with connect() as other:
        other.execute("update spark_outbox_event set created_at = now() - interval '1 day'")
        other.execute("update spark_outbox_event set status = 'done' where key = 'retried'")
    assert lag() > dt.timedelta(hours=23)
    OutboxEvent.objects.filter(key="head").update(status="failed")
    assert lag() is None
    keys("spark_replay(%s, %s)", "retried", "other")
    assert lag() is None


def test_the_lag_counts_what_waits_for_a_pause_or_a_circuit_since_it_could_have_been_handled(
    own_registry, settings
):
    settings.SPARK_OUTBOX = {"BREAK_AFTER": 2}
    clock, bad = Clock(), [True]

    def fail(event):
        if bad[0]:
            raise ValueError

    handler("^g$", name="fails", backoff=HOUR)(fail)
    own_registry.add_handler(lambda event: None, group="^paused$", name="works")
    worker = Worker(clock=clock)

    def late():
        rows, _ = run("select event_group, late from spark_outbox_status")
        return {row["event_group"]: row["late"] and row["late"] > dt.timedelta(hours=12) for row in rows}

    def age():
        """Have everything been a day ago, but for what is still to come."""
        with connect() as other:
            other.execute(
                "update spark_outbox_event set created_at = created_at - interval '1 day';"
                "update spark_outbox_delivery set attempted_at = attempted_at - interval '1 day'"
            )

    names("spark_pause('group', 'paused')")
    emit("paused", "delayed", delay=HOUR)
    emit("g", "0")
    emit("g", "1")
    worker.drain()
    age()
    assert late() == {"g": None, "paused": None}  # the next attempt, and a delay
    make_due()
    emit("g", "2")
    worker.drain()  # the circuit is open
    assert late() == {"g": False, "paused": False}  # since now, though it was emitted a day ago
    age()
    assert late() == {"g": True, "paused": True}
    for _ in range(2):
        make_due()
        worker.drain()  # it is put off again
        assert Delivery.objects.filter(error__contains="not called").count() == 4
        assert late() == {"g": True, "paused": True}
    names("spark_resume('group', 'paused')")
    bad[0] = False
    clock.now += 60
    make_due()
    worker.drain()
    assert late() == {"g": None, "paused": None}


def test_a_replay_that_fails_is_retried_alone(failing, own_registry):
    calls = []

    def new(event):
        calls.append(event.key)
        if len(calls) == 2:
            raise ValueError

    handler("", name="new", backoff=0.001)(new)
    emit("g", "key")
    Worker().drain()
    keys("spark_replay(%s, %s)", "key", "new")
    with worker_thread():
        eventually(lambda: status() == "done" and len(calls) == 3)
    assert len(failing) == 1


def test_a_replay_to_a_detached_handler_calls_no_other(failing, own_registry):
    calls = []
    handler("", name="detached", atomic=False)(lambda event: calls.append(event.key))
    emit("g", "key")
    with worker_thread():
        eventually(lambda: status() == "done")
        keys("spark_replay(%s, %s)", "key", "detached")
        eventually(lambda: len(calls) == 2 and status() == "done")
    assert len(failing) == 1


def test_a_pruned_event_is_left_out(failing):
    emit("g", "key")
    OutboxEvent.objects.update(status="discarded", digest=1)
    reason = ["The event 'key' is left out: it was pruned, and of its payload nothing is left."]
    assert keys("spark_retry(%s)", "key") == ([], reason)
    assert "It has been pruned" in explain("key")


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ("failed", "pending", False),
        ("done", "pending", False),
        ("pending", "discarded", False),
        ("pending", "nonsense", True),
    ],
)
def test_a_plain_update_works_as_well(failing, before, after, refused):
    emit("g", "key")
    OutboxEvent.objects.update(status=before)
    with connect() as other:
        if refused:
            with pytest.raises(CheckViolation):
                other.execute("update spark_outbox_event set status = %s", [after])
        else:
            other.execute("update spark_outbox_event set status = %s", [after])


# Explanations


def test_it_is_explained_where_an_event_is(own_registry):
    assert "There is no event with this key" in explain("key")
    emit("g", "key")
    assert "It is pending, in the group g" in explain("key")
    assert "No worker that can be seen is there" in explain("key")
    emit("g", "later", delay=HOUR)
    assert "It is not to be handled before" in explain("later")
    with worker_thread(groups="^other$"):
        assert "None of the 1 workers that are there takes its group" in explain("key")
    Worker().drain()
    assert "No handler matched its group" in explain("key")

    def fail(event):
        raise ValueError("no\nreason")

    handler("", name="fails", max_attempts=2)(fail)
    own_registry.add_handler(lambda event: None, group="g", name="other")
    keys("spark_retry(%s)", "key")
    Worker().drain()
    said = explain("key")
    assert "The handler fails has failed 1 times, the last time at" in said
    assert "builtins.ValueError: no." in said
    assert "Its next attempt is at" in said
    keys("spark_retry(%s)", "key")
    Worker().drain()
    assert "The handler fails has failed 2 times" in explain("key")
    assert "It is failed, in the group g" in explain("key")


def test_an_open_circuit_is_explained(own_registry, settings):
    settings.SPARK_OUTBOX = {"BREAK_AFTER": 2}

    def fail(event):
        raise ValueError

    own_registry.add_handler(fail, group="", name="fails")
    for number in range(20):
        emit("g", f"{number:02}")
    Worker().drain()
    waiting = Delivery.objects.filter(error__contains="circuit").first()
    said = explain(waiting.event.key)
    assert "its circuit is open" in said
    assert "spark_outbox_close_circuit('fails')" in said
    assert health()["circuits"] == "warning"


def test_what_a_handler_gave_up_is_explained(own_registry):
    def give_up(event):
        raise Discard("not for us")

    own_registry.add_handler(give_up, group="", name="h")
    emit("g", "key")
    Worker().drain()
    assert "It is discarded" in explain("key")
    assert "The handler h does not get it any more: spark_outbox.errors.Discard: not for us." in explain(
        "key"
    )


def test_a_trigger_of_the_project_is_named(own_registry):
    emit("g", "key")
    with connect() as other:
        other.execute(
            "create function refuse() returns trigger language plpgsql as $$ begin return null; end $$;"
            "create trigger audit before update on spark_outbox_event "
            "for each row execute function refuse()"
        )
        try:
            assert "Your trigger audit on spark_outbox_event may keep workers" in explain("key")
        finally:
            other.execute("drop function refuse cascade")
