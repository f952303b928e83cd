"""What a handler may do to the worker's session: by whatever way, it hurts no other handler."""

import contextlib
import contextvars

import psycopg
import pytest
from django.db import connection, connections, transaction
from django.utils import timezone, translation
from psycopg import sql
from psycopg.rows import dict_row

from spark_outbox import Event, emit, emit_many, handler
from spark_outbox.errors import HandlerTimeout
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.operating.replay import Selection, rehearse
from spark_outbox.registry.policy import Policy
from spark_outbox.store import isolating, limiting, resting, settling
from spark_outbox.worker import wire
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.savepoints import MAX_SUBTRANSACTIONS
from tests.challenges.models import Challenge, Handled
from tests.tools import (
    HOUR,
    deliveries,
    eventually,
    handled,
    make_challenge,
    note,
    status,
    statuses,
    wait_until_asleep,
    wait_until_done,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)

INSERT = "insert into challenges_handled (key, handler, note) values (%s, 'raw', '')"
ROW = "insert into challenges_handled (key, handler, note) values ('raw', 'raw', '')"
COPY = "copy challenges_handled (key, handler, note) from stdin"
KEYS = ["before", "bad", "after 1", "after 2"]


@pytest.fixture(autouse=True)
def own_session():
    """What a worker in this thread has set for its session ends with the test."""
    yield
    connections.close_all()


def run(text, params=None):
    """Run SQL through Django; return its rows, if it has any."""
    with connection.cursor() as cursor:
        cursor.execute(text, params)
        return cursor.fetchall() if cursor.description else []


def show(name):
    return run("select current_setting(%s, true)", [name])[0][0]


def work(**options):
    """Be a worker process until nothing is ready."""
    Worker(**options).run(drain=True)


# Around Django's cursors


def executemany(raw):
    with raw.cursor() as cursor:
        cursor.executemany(INSERT, [["raw"], ["raw"]])


def executemany_returning(raw):
    with raw.cursor() as cursor:
        cursor.executemany(INSERT + " returning id", [["raw"], ["raw"]], returning=True)


def named_cursor(raw):
    with raw.cursor(name="named") as cursor:
        cursor.execute("select spark_emit('raw', 'raw')").fetchall()


def client_cursor(raw):
    psycopg.ClientCursor(raw).execute(ROW)


def raw_cursor(raw):
    psycopg.RawCursor(raw).execute(ROW)


def execute(raw):
    raw.execute(ROW)


def composed(raw):
    raw.execute(sql.SQL(ROW))


def transaction_block(raw):
    with raw.transaction():
        raw.execute(ROW)


def pipeline(raw):
    with raw.pipeline():
        raw.execute(ROW)
        raw.execute(INSERT, ["raw"])


def pipeline_with_transaction(raw):
    with raw.pipeline(), raw.transaction():
        raw.execute(ROW)


def copy(raw):
    with connection.cursor().copy(COPY) as copying:
        copying.write_row(("raw", "raw", ""))


def copy_out_first(raw):
    with raw.cursor().copy("copy challenges_handled to stdout") as copying:
        list(copying)
    raw.execute(ROW)


def stream(raw):
    list(raw.cursor().stream(ROW + " returning id"))


def as_bytes(raw):
    with connection.cursor() as cursor:
        cursor.execute(ROW.encode())


def as_composed(raw):
    with connection.cursor() as cursor:
        cursor.execute(sql.SQL(ROW))


def do_block(raw):
    raw.execute("do $$ begin perform spark_emit('raw', 'raw'); end $$")


WAYS = [
    executemany,
    executemany_returning,
    named_cursor,
    client_cursor,
    raw_cursor,
    execute,
    composed,
    transaction_block,
    pipeline,
    pipeline_with_transaction,
    copy,
    copy_out_first,
    stream,
    as_bytes,
    as_composed,
    do_block,
]


def handle_with(registry, way, *, fails=False, **options):
    """Register a handler that does `way` to the event `bad`, and notes all others."""

    def handle(event):
        if event.key != "bad":
            note(event)
            return
        way(connection.connection)
        if fails:
            raise RuntimeError("roll back, please")

    registry.add_handler(
        handle,
        group="^g$",
        name="h",
        policy=Policy(backoff=3600, **options.pop("policy", {})),
        **options,
    )
    for key in KEYS:
        emit("g", key)


def others():
    return {key: status for key, status in statuses().items() if key in KEYS and key != "bad"}


OTHERS_DONE = {"before": "done", "after 1": "done", "after 2": "done"}


def rows_of_raw():
    return Handled.objects.filter(key="raw").count() + OutboxEvent.objects.filter(key="raw").count()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fails", [True, False])
def test_whatever_cursor_a_handler_uses_its_writes_stand_or_fall_with_it(own_registry, way, fails):
    handle_with(own_registry, way, fails=fails)
    Worker(commit_interval=HOUR).drain()
    assert others() == OTHERS_DONE
    assert status("bad") == ("pending" if fails else "done")
    assert (rows_of_raw() == 0) is fails
    assert [key for key in handled() if key != "raw"] == list(OTHERS_DONE)


def commit(raw):
    raw.commit()


def roll_back(raw):
    raw.rollback()


def write_and_commit(raw):
    raw.execute(ROW)
    raw.commit()


def write_and_roll_back(raw):
    raw.execute(ROW)
    raw.rollback()


def commit_and_write(raw):
    with contextlib.suppress(Exception):
        raw.commit()
    raw.execute(ROW)


def commit_as_sql(raw):
    run("commit")


def comment_and_commit(raw):
    run("/* no ' more */ -- '\n COMMIT AND CHAIN")


def roll_back_as_bytes(raw):
    raw.execute(b"rollback")


def end_in_between(raw):
    raw.execute(f"{ROW}; end; begin; {ROW}")


def commit_in_between(raw):
    run(f"{ROW}; commit; begin; {ROW}")


def commit_in_a_pipeline(raw):
    with raw.pipeline():
        raw.execute(ROW)
        raw.commit()


def prepare_transaction(raw):
    run("prepare transaction 'x'")


def nested_comment(raw):
    raw.execute("/* /* */ */ commit")  # it is not understood, but its effect is seen
    raw.execute(ROW)


ENDINGS = [
    commit,
    roll_back,
    write_and_commit,
    write_and_roll_back,
    commit_and_write,
    commit_as_sql,
    comment_and_commit,
    roll_back_as_bytes,
    end_in_between,
    commit_in_between,
    commit_in_a_pipeline,
    prepare_transaction,
]


@pytest.mark.parametrize("end", ENDINGS)
@pytest.mark.parametrize("swallows", [False, True])
def test_a_handler_cannot_end_the_transaction_that_it_shares(own_registry, end, swallows):
    calls = []

    def handle(event):
        calls.append(event.key)
        if event.key != "bad":
            note(event)
            return
        with contextlib.suppress(Exception) if swallows else contextlib.nullcontext():
            end(connection.connection)

    own_registry.add_handler(handle, group="^g$", name="h", policy=Policy(backoff=3600))
    for key in KEYS:
        emit("g", key)
    Worker(commit_interval=HOUR).drain()
    assert calls == KEYS  # each was called once: nothing of theirs had to be handled again
    assert statuses() == {**OTHERS_DONE, "bad": "pending"}
    assert handled() == list(OTHERS_DONE)
    assert "BrokenTransaction: The handler must not commit or roll back" in Delivery.objects.get().error


def test_a_commit_that_nobody_could_foresee_is_the_failure_of_the_handler_that_sent_it(own_registry):
    handle_with(own_registry, nested_comment)
    Worker(commit_interval=HOUR).drain()
    assert others() == OTHERS_DONE
    assert status("bad") == "pending"
    assert "committed or rolled back the worker's transaction" in Delivery.objects.get().error
    assert rows_of_raw() == 0


def libpq_commit(raw):
    raw.pgconn.exec_(b"commit")


def libpq_error(raw):
    raw.pgconn.exec_(b"select 1 / 0")


@pytest.mark.parametrize("way", [libpq_commit, libpq_error])
@pytest.mark.parametrize("fails", [True, False])
def test_a_transaction_that_a_handler_ends_by_libpq_itself_is_its_own_failure(own_registry, way, fails):
    handle_with(own_registry, way, fails=fails)
    Worker(commit_interval=HOUR).drain()
    assert others() == OTHERS_DONE
    assert status("bad") == "pending"
    assert "BrokenTransaction" in Delivery.objects.get().error
    assert set(handled()) == set(OTHERS_DONE)


def error_of_a_named_cursor(raw):
    with contextlib.suppress(psycopg.Error), raw.cursor(name="named") as cursor:
        cursor.execute("select * from there_is_no_such_table")


@pytest.mark.parametrize("fails", [True, False])
def test_an_error_that_a_handler_swallows_around_django_is_found_out(own_registry, fails):
    handle_with(own_registry, error_of_a_named_cursor, fails=fails)
    Worker(commit_interval=HOUR).drain()
    assert others() == OTHERS_DONE
    assert status("bad") == "pending"
    assert handled() == list(OTHERS_DONE)


KEPT = []


def leave_a_stream_open(raw):
    rows = raw.cursor().stream("select generate_series(1, 1000)")
    next(rows)
    KEPT.append(rows)


def leave_a_copy_open(raw):
    copying = raw.cursor().copy(COPY)
    copying.__enter__()
    KEPT.append(copying)


def leave_a_pipeline_open(raw):
    pipeline = raw.pipeline()
    pipeline.__enter__()
    KEPT.append(pipeline)


@pytest.mark.parametrize("leave", [leave_a_stream_open, leave_a_copy_open, leave_a_pipeline_open])
@pytest.mark.parametrize("fails", [True, False])
def test_a_handler_that_leaves_the_connection_busy_blocks_nobody(own_registry, leave, fails):
    handle_with(own_registry, leave, fails=fails)
    with worker_thread(commit_interval=HOUR):
        eventually(lambda: others() == OTHERS_DONE)
        eventually(lambda: Delivery.objects.filter(attempts=1).exists())
        wait_until_asleep()
    with contextlib.suppress(psycopg.Error):
        KEPT.pop().close() if leave is leave_a_stream_open else KEPT.pop().__exit__(None, None, None)
    assert status("bad") == "pending"
    assert "stream() or a pipeline()" in Delivery.objects.get().error
    assert sorted(handled()) == sorted(OTHERS_DONE)


def test_raw_writes_count_as_subtransactions(own_registry):
    own_registry.add_handler(lambda _: connection.connection.execute(ROW), group="", name="h")
    emit_many({"group": "g", "key": f"{n:03}"} for n in range(200))
    worker = Worker(commit_interval=HOUR)
    worker._claims.size.fitting = 200
    assert worker.handle_batch() == MAX_SUBTRANSACTIONS


def test_savepoints_of_psycopg_count_as_subtransactions(own_registry):
    def nest(event):
        for _ in range(MAX_SUBTRANSACTIONS):
            with connection.connection.transaction():
                connection.connection.execute(ROW)

    own_registry.add_handler(nest, group="")
    emit_many({"group": "g", "key": f"{n:03}"} for n in range(5))
    assert Worker(commit_interval=HOUR).handle_batch() == 1


RENAME = "update challenges_challenge set title = 'new'"


@pytest.mark.parametrize(
    "rename",
    [
        lambda raw: raw.execute(RENAME),
        lambda raw: raw.cursor().executemany(RENAME + " where id > %s", [[0], [1]]),
        lambda raw: psycopg.ClientCursor(raw).execute(RENAME.encode()),
        lambda raw: raw.execute(
            "do $do$ begin execute format($q$update %I set title = 'new'$q$, "
            "'challenges_' || 'challenge'); end $do$"
        ),
    ],
    ids=["execute", "executemany", "bytes", "do"],
)
def test_after_a_raw_write_instances_are_fetched_again(own_registry, rename):
    titles = []

    def look(event):
        titles.append(event["challenge"].title)

    own_registry.add_handler(look, group="^g$", name="before")
    own_registry.add_handler(lambda _: rename(connection.connection), group="^g$", name="rename")
    own_registry.add_handler(look, group="^g$", name="after")
    emit("g", "key", challenge=make_challenge("old"))
    Worker().drain()
    assert titles == ["old", "new"]


def test_after_a_rollback_to_a_savepoint_instances_are_fetched_again(own_registry):
    titles = []

    def look(event):
        titles.append(event["challenge"].title)

    @handler("^g$", name="change")
    def change(event):
        with contextlib.suppress(RuntimeError), transaction.atomic():
            Challenge.objects.update(title="new")
            look(event)
            raise RuntimeError

    own_registry.add_handler(look, group="^g$", name="look")
    emit("g", "key", challenge=make_challenge("old"))
    Worker().drain()
    assert titles == ["new", "old"]


# Reading SQL


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("SELECT 1", wire.READS),
        ("  (select 1)", wire.READS),
        ("insert into t values (1)", wire.WRITES),
        ("with x as (delete from t) select 1", wire.WRITES),
        ("UPDATE t SET a = 'x; commit; y'", wire.WRITES),
        ('update t set "a; commit" = 1', wire.WRITES),
        (r"update t set a = E'\'; commit; --'", wire.WRITES),
        (r"update t set a = 'C:\'; commit", wire.WRITES | wire.ENDS),
        ("update t set a = $x$'; commit; $x$; -- ; commit", wire.WRITES),
        ("-- why\nselect 1", wire.READS),
        ("/* ; commit */ select 1;", wire.READS),
        ("create function f() begin atomic select 1; end", wire.WRITES),
        ("savepoint x", wire.WRITES | wire.SAVEPOINT),
        ('ROLLBACK TO SAVEPOINT "x"', wire.WRITES | wire.ANYTHING),
        ("rollback work to x", wire.WRITES | wire.ANYTHING),
        ("rollback", wire.ENDS),
        ("Rollback Work", wire.ENDS),
        ("select 1; commit", wire.ENDS),
        ("prepare transaction 'x'", wire.ENDS),
        ("prepare x as select 1", wire.WRITES),
        ("set local x = 1", wire.SETS),
        ("set constraints all immediate", wire.DEFERS),
        ("reset all", wire.SETS),
        ("SELECT set_config('a.b', 'c', false)", wire.SETS),
        ("select SET_CONFIG('a.b', 'c', false)", wire.SETS),
        ("do $$ begin commit; end $$", wire.SETS | wire.WRITES | wire.ANYTHING),
        ("", wire.READS),
    ],
)
def test_the_kind_of_a_statement(text, kind):
    assert wire.kind(text) == kind


# Settings


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


# Limits


@pytest.fixture
def project_limit(monkeypatch):
    """A project that allows its statements 250 ms."""
    connection.close()
    options = {**connection.settings_dict["OPTIONS"], "options": "-c statement_timeout=250"}
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", options)
    yield
    connection.close()


def test_the_projects_statement_timeout_is_for_handlers_and_not_for_the_worker(
    own_registry, project_limit, monkeypatch
):
    seen, own = [], []
    outlook = resting.outlook

    def look_at_outlook(**options):
        own.append(show("statement_timeout"))
        return outlook(**options)

    monkeypatch.setattr(resting, "outlook", look_at_outlook)
    finish = settling.finish

    def look_at_settle(*arguments, **options):
        own.append(show("statement_timeout"))
        return finish(*arguments, **options)

    monkeypatch.setattr(settling, "finish", look_at_settle)

    def look(event):
        seen.append((event.group, show("statement_timeout")))
        transaction.on_commit(lambda: seen.append(("callback", show("statement_timeout"))))

    own_registry.add_handler(look, group="^free")
    handler("^less", name="less", timeout=0.1)(look)
    handler("^more", name="more", timeout=60)(look)
    handler("^detached", name="detached", atomic=False, timeout=60)(look)
    for group in ("free", "less", "more", "detached"):
        emit(group, group)
    emit("free", "free again")
    with worker_thread():
        wait_until_done(5)
        wait_until_asleep()
    assert set(seen) == {
        ("free", "250ms"),
        ("less", "100ms"),
        ("more", "250ms"),
        ("detached", "250ms"),
        ("callback", "250ms"),
    }
    assert set(own) == {"0"}


def test_a_query_of_a_handler_ends_with_the_projects_statement_timeout(own_registry, project_limit):
    handler("^g$", name="slow", max_attempts=1)(lambda _: run("select pg_sleep(60)"))
    handler("^h$", name="detached", max_attempts=1, atomic=False)(lambda _: run("select pg_sleep(60)"))
    emit("g", "1")
    emit("h", "2")
    work()
    assert statuses() == {"1": "failed", "2": "failed"}
    for delivery in Delivery.objects.all():
        assert "statement timeout" in delivery.error


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_behind_a_pooler_the_limit_is_lifted_for_each_transaction_alone(
    own_registry, project_limit, settings, monkeypatch
):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": "other", "COMMIT_INTERVAL": 600}
    seen, own = [], []
    finish = settling.finish

    def look_at_settle(*arguments, **options):
        own.append(show("statement_timeout"))
        return finish(*arguments, **options)

    monkeypatch.setattr(settling, "finish", look_at_settle)

    @handler("", name="h")
    def look(event):
        seen.append(show("statement_timeout"))
        run("set statement_timeout = '7s'; set idle_in_transaction_session_timeout = '7s'")

    for key in "12":
        emit("g", key)
    work()
    assert seen == ["250ms"] * 2
    assert own == ["0"]
    assert show("statement_timeout") == "250ms"
    assert show("idle_in_transaction_session_timeout") == "7s"  # it was the handler that said so


def test_who_drains_on_a_connection_of_its_own_finds_it_as_it_was(own_registry):
    seen = []

    def look(event):
        seen.append(show("statement_timeout"))

    handler("", name="less", timeout=1)(look)
    handler("", name="more", timeout=60)(look)
    own_registry.add_handler(look, group="", name="free")
    own_registry.add_handler(lambda _: run("set statement_timeout = 1"), group="", name="sets")
    run("set statement_timeout = '7s'")
    emit("g", "key")
    with transaction.atomic():
        Worker().drain()
        assert show("statement_timeout") == "7s"
    assert seen == ["1s", "7s", "7s"]
    assert show("statement_timeout") == "7s"
    assert status() == "done"


# A payload that costs the transaction


@pytest.mark.parametrize("is_async", [False, True])
def test_an_alarm_that_rings_as_a_payload_is_read_charges_no_other_event(
    own_registry, monkeypatch, is_async
):
    """The savepoint that was to be taken may not be there: then nothing of the batch can be kept."""
    rings = []
    savepoint = isolating.savepoint

    def ring(sql, *, using):
        if not rings and sql.startswith(("savepoint", "set local", "release")):
            rings.append(sql)
            raise HandlerTimeout
        savepoint(sql, using=using)

    def check(event):
        if event.key == "bad" and not rings:
            monkeypatch.setattr(isolating, "savepoint", ring)
            connection.connection.execute("select 1")

    for name in ("check", "load"):
        original = getattr(Event, name)
        monkeypatch.setattr(
            Event, name, lambda event, original=original: (check(event), original(event))[1]
        )

    async def note_later(event):
        await Handled.objects.acreate(key=event.key, handler="async")

    function = note_later if is_async else note
    own_registry.add_handler(function, group="^g$", name="h", policy=Policy(backoff=3600))
    own_registry.add_handler(note, group="^plain$", name="plain")
    for key in KEYS:
        emit("g" if key != "after 1" else "plain", key, at=timezone.now())
    work(commit_interval=HOUR)
    assert rings
    assert statuses() == {"before": "done", "bad": "pending", "after 1": "done", "after 2": "done"}
    assert {d.event.key for d in Delivery.objects.select_related("event")} == {"bad"}
    assert Delivery.objects.get().attempts == 1


# Rehearsals


def test_a_rehearsal_ends_with_the_handler_that_costs_it_its_connection(own_registry):
    for key in "123":
        emit("g", key)
    own_registry.add_handler(note, group="", name="old")
    Worker().drain()

    @handler("", name="new")
    def close(event):
        if event.key == "2":
            connection.close()

    selection = Selection(handler=own_registry.handlers[-1])
    done = rehearse(selection, using="default", limit=10)
    assert done.events == 2
    assert [key for key, _ in done.failures] == ["2"]
