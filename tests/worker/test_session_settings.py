"""Whatever a handler sets, in its session or in Django, ends with it."""

import contextvars

import psycopg
import pytest
from django.db import connection, transaction
from django.utils import timezone, translation
from psycopg import sql
from psycopg.rows import dict_row

from spark_outbox import emit, emit_many, handler
from spark_outbox.models import OutboxEvent
from spark_outbox.store import isolating, limiting
from spark_outbox.worker.loop import Worker
from tests.tools import (
    HOUR,
    deliveries,
    eventually,
    handled,
    make_challenge,
    note,
    status,
    statuses,
    work,
    worker_thread,
)
from tests.worker.neighbours import KEYS, OTHERS_DONE, others
from tests.worker.sql import run, show

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("own_session")]


# In the worker's transaction


SETTINGS = {
    "search_path": "set search_path = nowhere",
    "local search_path": "set local search_path = nowhere",
    "search_path that hides functions": (
        "create schema fake; create function fake.set_config(text, text, boolean) returns text "
        "language sql as 'select null::text'; set search_path = fake, pg_catalog"
    ),
    "role": "set role pg_monitor",
    "local role": "set local role pg_monitor",
    "user": "set session authorization pg_monitor",
    "read only": "set transaction read only",
    "default read only": "set default_transaction_read_only = on; set lock_timeout = 1",
    "statement_timeout": "set statement_timeout = 1",
    "local statement_timeout": "set local statement_timeout = 1",
    "lock_timeout": "set lock_timeout = 1",
    "several": "set local search_path = nowhere; set role pg_monitor; set transaction read only",
    "time zone": "set time zone 'Asia/Kathmandu'",
    "reset": "reset all; set search_path = nowhere",
    "set_config": "select set_config('search_path', 'nowhere', false)",
    "do": "do $$ begin perform set_config('search_path', 'nowhere', false); end $$",
    "own": "set app.tenant = '7'",
    "own by set_config": (
        "select set_config('app.tenant', '7', false), set_config('App.Other', '7', true)"
    ),
}

LOOK = [
    "search_path",
    "role",
    "session_authorization",
    "transaction_read_only",
    "default_transaction_read_only",
    "statement_timeout",
    "lock_timeout",
    "TimeZone",
    "application_name",
    "idle_in_transaction_session_timeout",
]


def by_django(text):
    run(text)


def by_django_as_bytes(text):
    run(text.encode())


def by_raw(text):
    connection.connection.execute(sql.SQL(text))


def by_executemany(text):
    connection.connection.cursor().executemany(text, [None])


SETTERS = {
    **{f"{name}, django": (text, by_django) for name, text in SETTINGS.items()},
    **{
        f"{name}, {by.__name__}": (SETTINGS[name], by)
        for name in ("search_path", "local role", "read only", "own by set_config", "do")
        for by in (by_django_as_bytes, by_raw, by_executemany)
    },
}


def look_around():
    own = {name: show(name) or "" for name in ("app.tenant", "app.other")}
    session = {"session": run("select pg_backend_pid()")}  # nobody had to connect again
    return {name: show(name) for name in LOOK} | own | session


@pytest.mark.parametrize("how", SETTERS)
@pytest.mark.parametrize("fails", [False, True])
def test_a_setting_that_a_handler_makes_ends_with_it(own_registry, how, fails):
    text, by = SETTERS[how]
    seen = []

    @handler("^g$", name="h", backoff=3600)
    def handle(event):
        if event.key == "bad":
            by(text)
            if fails:
                raise RuntimeError
            return
        seen.append(look_around())
        note(event)

    for key in KEYS:
        emit("g", key)
    with worker_thread(commit_interval=HOUR):
        eventually(lambda: others() == OTHERS_DONE)
        eventually(lambda: status("bad") == "done" or deliveries())
        emit("g", "later")  # to a batch of its own, with the same session
        eventually(lambda: status("later") == "done")
    assert status("bad") == ("pending" if fails else "done")
    assert handled() == [*OTHERS_DONE, "later"]
    assert seen[1:] == seen[:1] * 3


def test_a_handler_that_is_first_to_touch_the_database_may_set_what_it_likes(own_registry):
    own_registry.add_handler(lambda _: run("set transaction read only"), group="", name="first")
    own_registry.add_handler(note, group="", name="second")
    for key in "12":
        emit("g", key)
    Worker(commit_interval=HOUR).drain()
    assert set(statuses().values()) == {"done"}
    assert handled() == ["1", "2"]


def test_a_setting_of_the_projects_own_is_put_back_as_the_project_made_it(own_registry):
    seen = []

    @handler("", name="h")
    def handle(event):
        seen.append((show("app.service"), show("lock_timeout")))
        run("select set_config(%s, %s, %s)", ["app.service", "other", event.key == "2"])
        run("reset lock_timeout")

    run("set app.service = 'worker'; set lock_timeout = '7s'")
    for key in "123":
        emit("g", key)
    Worker(commit_interval=HOUR).drain()
    assert seen == [("worker", "7s")] * 3
    assert (show("app.service"), show("lock_timeout")) == ("worker", "7s")


def test_a_setting_made_in_a_pipeline_ends_with_its_handler(own_registry):
    seen = []

    @handler("", name="h")
    def handle(event):
        seen.append((show("app.tenant") or "", show("lock_timeout")))
        with connection.connection.pipeline():
            connection.connection.execute("set app.tenant = '7'")
            connection.connection.execute("set lock_timeout = '7s'")
        note(event)

    for key in "12":
        emit("g", key)
    Worker(commit_interval=HOUR).drain()
    assert seen == [("", "0")] * 2
    assert handled() == ["1", "2"]


def test_a_handler_that_only_writes_pays_nothing_for_it(own_registry, monkeypatch):
    own_registry.add_handler(note, group="")
    for name in ("settings", "restore_settings"):
        monkeypatch.setattr(isolating, name, None)
    monkeypatch.setattr(limiting, "statement_timeout", None)
    emit_many({"group": "g", "key": f"{n}"} for n in range(5))
    assert Worker().drain() == 5


def test_settings_are_put_back_in_one_round_trip_each_and_read_once_a_batch(own_registry, monkeypatch):
    sent = []
    past_wrappers = isolating.past_wrappers
    monkeypatch.setattr(
        isolating, "past_wrappers", lambda sql, using: (sent.append(sql), past_wrappers(sql, using))[1]
    )
    own_registry.add_handler(lambda _: run("set local app.tenant = '7'"), group="", name="h")
    emit_many({"group": "g", "key": f"{n}"} for n in range(5))
    Worker(commit_interval=HOUR).handle_batch()
    assert sum("json_object_agg" in sql for sql in sent) == 1
    assert sum("reset session authorization" in sql for sql in sent) == 5


def test_constraints_that_a_handler_makes_immediate_are_so_for_no_later_event(own_registry):
    challenge = make_challenge()
    OutboxEvent.objects.all().delete()

    @handler("", name="h", backoff=3600)
    def handle(event):
        if event.key == "1":
            run("set constraints all immediate")
        else:  # as a fixture does it: first the row, then what it refers to
            run("insert into challenges_donation (challenge_id, amount) values (-1, 1)")
            run("update challenges_donation set challenge_id = %s", [challenge.pk])

    for key in "12":
        emit("g", key)
    Worker(commit_interval=HOUR).drain()
    assert statuses() == {"1": "done", "2": "done"}


def test_how_a_handler_has_psycopg_make_rows_and_cursors_is_for_itself_alone(own_registry):
    @handler("", name="h")
    def handle(event):
        raw = connection.connection
        raw.row_factory = dict_row
        raw.cursor_factory = psycopg.RawCursor
        assert raw.execute("select 1 as one").fetchone() == {"one": 1}
        note_rows = raw.execute("select key from challenges_handled").fetchall()
        assert all(set(row) == {"key"} for row in note_rows)

    own_registry.add_handler(note, group="", name="note")
    for key in "12":
        emit("g", key)
    with worker_thread():
        eventually(lambda: set(statuses().values()) == {"done"})
        emit("g", "3")
        eventually(lambda: status("3") == "done")
    assert handled() == ["1", "2", "3"]


# Outside of the worker's transaction


def test_a_setting_that_a_detached_handler_makes_ends_with_it(own_registry):
    seen = []

    @handler("^g$", name="h", atomic=False)
    def handle(event):
        run("set search_path = nowhere")
        run("select set_config('app.tenant', '7', false)")
        run("set role pg_monitor")
        run("set statement_timeout = 1")

    own_registry.add_handler(lambda _: seen.append(look_around()), group="^look$", name="look")
    emit("look", "1")
    emit("g", "2")
    with worker_thread():
        eventually(lambda: status("2") == "done")
        emit("look", "3")
        eventually(lambda: status("3") == "done")
    assert seen[0] == seen[1]


def test_a_setting_that_a_callback_makes_ends_with_it(own_registry):
    seen = []

    @handler("^g$", name="h")
    def handle(event):
        transaction.on_commit(lambda: run("set search_path = nowhere; set role pg_monitor"))
        transaction.on_commit(lambda: seen.append(look_around()))

    emit("g", "1")
    with worker_thread():
        eventually(lambda: seen)
        emit("g", "2")
        eventually(lambda: len(seen) == 2)
    assert seen[0] == seen[1]
    assert seen[0]["role"] == "none"


# Django's own


tenant = contextvars.ContextVar("tenant", default=None)


def activate(event):
    translation.activate("de")
    timezone.activate("Asia/Kathmandu")
    tenant.set(event.key)


async def activate_later(event):
    activate(event)


def activate_list(events):
    activate(events[0])


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (activate, {}),
        (activate, {"timeout": 60}),
        (activate, {"atomic": False}),
        (activate_list, {"batch": 2}),
        (activate_later, {}),
        (activate_later, {"atomic": False}),
        (lambda event: transaction.on_commit(lambda: activate(event)), {}),
    ],
    ids=["plain", "timeout", "detached", "list", "async", "detached async", "callback"],
)
def test_a_language_that_a_handler_activates_ends_with_it(own_registry, function, options):
    seen = []

    def look(event):
        seen.append((translation.get_language(), timezone.get_current_timezone_name(), tenant.get()))

    own_registry.add_handler(look, group="^look", name="look")
    handler("^g$", name="h", **options)(function)
    before = translation.get_language(), timezone.get_current_timezone_name(), None
    for number in range(3):
        emit("g", f"{number}")
        emit("look", f"look {number}")
    work()
    emit("look", "look last")
    work()
    assert set(statuses().values()) == {"done"}
    assert set(seen) == {before}
    assert (translation.get_language(), timezone.get_current_timezone_name(), tenant.get()) == before
