"""Who may do what in the database, what a hostile search_path can do, and what is never logged.

The roles of deploy/roles.sql are tested by connecting as each. Names that the database holds are
tested in test_hostile.py.
"""

import contextlib
import io
import os
import secrets
import signal
from functools import partial

import psycopg
import pytest
from asgiref.sync import async_to_sync
from django.core.management import CommandError, call_command
from django.db import ProgrammingError, connection, transaction
from psycopg.conninfo import make_conninfo
from psycopg.errors import InsufficientPrivilege, UniqueViolation

from spark_outbox import aemit, emit, emit_many, source
from spark_outbox.errors import DuplicateKey, IdCollision
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.store import (
    checking,
    claiming,
    detached,
    emitting,
    replaying,
    sessions,
    settling,
    waking,
)
from spark_outbox.store.detached import Running
from spark_outbox.store.emitting import NewRow
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.outcome import Fate, Result
from tests.challenges.models import Challenge, Handled
from tests.postgres import ROOT
from tests.probe.handlers import WAYS
from tests.test_readme import blocks
from tests.tools import (
    WorkerProcess,
    connect,
    conninfo,
    eventually,
    make_challenge,
    manage,
    notifications,
    status,
    wait_until_asleep,
    wait_until_ended,
)

pytestmark = pytest.mark.django_db(transaction=True)

ROLES = ("emitter", "worker", "viewer")
ROLES_SQL = (ROOT / "deploy" / "roles.sql").read_text()

# What a project grants besides: its own tables.
PROJECT = """
grant select, insert, update, delete
    on challenges_challenge, challenges_donation, challenges_handled, auth_group to {}
"""


# Roles


class Logins:
    """Roles that can log in, one in each role of deploy/roles.sql, and `nobody`, who is in none."""

    def __init__(self, admin):
        self.password = secrets.token_hex()
        self.names = {kind: f"spark_test_{kind}_{os.getpid()}" for kind in (*ROLES, "nobody")}
        for kind, name in self.names.items():
            admin.execute(f"create role {name} login password '{self.password}'")
            admin.execute(f"grant {name} to current_user")
            if kind in ROLES:
                admin.execute(f"grant spark_outbox_{kind} to {name}")
                admin.execute(PROJECT.format(name))

    def url(self, kind, **options):
        return make_conninfo(conninfo(), user=self.names[kind], password=self.password, **options)

    def connect(self, kind, **options):
        return psycopg.connect(self.url(kind, **options), autocommit=True)

    @contextlib.contextmanager
    def django(self, kind):
        """Have Django's connection connect as that role."""
        before = connection.settings_dict
        connection.close()
        login = {"USER": self.names[kind], "PASSWORD": self.password}
        connection.settings_dict = {**before, **login}
        try:
            with connection.cursor() as cursor:
                cursor.execute("select current_user")
                assert cursor.fetchone() == (self.names[kind],)
            yield
        finally:
            connection.close()
            connection.settings_dict = before


@pytest.fixture(scope="module")
def logins(django_db_setup):
    with connect() as admin:
        may = "select rolsuper or rolcreaterole from pg_roles where rolname = current_user"
        if not admin.execute(may).fetchone()[0]:
            pytest.skip("the tests' role may not create roles")
        groups = [f"spark_outbox_{kind}" for kind in ROLES]
        before = admin.execute("select rolname from pg_roles where rolname = any(%s)", [groups])
        kept = {name for (name,) in before}  # they belong to others on this server
        for _ in range(2):  # it can be run again
            admin.execute(ROLES_SQL)
        logins = Logins(admin)
        try:
            try:
                logins.connect("nobody").close()
            except psycopg.OperationalError:
                pytest.skip("the server lets nobody log in by password")
            yield logins
        finally:
            for name in (*logins.names.values(), *(set(groups) - kept)):
                # In use meanwhile by the tests of somebody else: then it is left to them.
                with contextlib.suppress(psycopg.errors.DependentObjectsStillExist):
                    admin.execute(f"grant {name} to current_user")
                    admin.execute(f"drop owned by {name}")
                    admin.execute(f"drop role {name}")


def test_the_emitter_emits_in_every_way(logins):
    with logins.django("emitter"):
        with transaction.atomic():
            assert emit("g", "key", secret=1).id
            assert emit("g", "key") is None
        assert emit("g", "key", on_duplicate="check", secret=1) is None
        for duplicate in (
            partial(emit, "g", "key", on_duplicate="raise"),
            partial(emit, "g", "key", on_duplicate="check", secret=2),
            partial(emit, "other", "key", on_duplicate="check", secret=1),
        ):
            with transaction.atomic(), pytest.raises(DuplicateKey):
                duplicate()
        emit("g", "with all", ordering_key="o", delay=60, headers={"trace": 1})
        events = [{"group": "g", "key": f"{number}"} for number in range(10)]
        assert [emit_many(events) for _ in range(2)] == [10, 0]
        async_to_sync(aemit)("g", "async")
        make_challenge()  # its source emits
    assert OutboxEvent.objects.filter(status="pending").count() == 14


def test_the_emitter_is_told_of_an_id_that_is_taken(logins):
    taken = emit("g", "key").id
    with connection.cursor() as cursor:
        cursor.execute("select setval('spark_outbox_event_id_seq', %s, false)", [taken])
    try:
        with logins.django("emitter"), pytest.raises(IdCollision, match="setval"):
            emit("g", "new")
        with connection.cursor() as cursor:
            cursor.execute("select setval('spark_outbox_event_id_seq', %s, false)", [taken])
        done = manage("check", "--database", "default", url=logins.url("nobody"))
        assert "is behind the table" in done.stderr
        with logins.connect("emitter") as mine, pytest.raises(UniqueViolation, match="has its id"):
            mine.execute("select spark_emit('g', 'new')")
    finally:
        with connection.cursor() as cursor:
            cursor.execute(checking.PUT_IDS_RIGHT)


def test_an_emit_by_the_emitter_wakes_a_sleeping_worker(logins):
    with WorkerProcess("--poll-interval", "3600", url=logins.url("worker")) as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        with logins.django("emitter"):
            emit("probe", "key")
        eventually(lambda: status() == "done")


NOT_FOR_ANYBODY = [
    "delete from spark_outbox_event",
    "truncate spark_outbox_event cascade",
    "drop table spark_outbox_event cascade",
    "drop view spark_outbox_status",
    "alter table spark_outbox_event add x text",
    "alter table spark_outbox_event disable trigger all",
    "drop trigger spark_outbox_wake on spark_outbox_event",
    "create trigger t after insert on spark_outbox_event execute function spark_outbox_wake('never')",
    "create index on spark_outbox_event (payload)",
    "alter function spark_emit(text, text, jsonb) reset search_path",
    (
        "create or replace function spark_outbox_is_same(outbox regclass, key text, event_group text, "
        "payload jsonb) returns boolean language sql as 'select true'"
    ),
    (
        "create or replace function spark_outbox_check_keys(outbox regclass, keys text[]) returns void "
        "language sql as 'select'"
    ),
    "alter function spark_outbox_emit_many security invoker",
    "lock table spark_outbox_event in access exclusive mode",
    "insert into spark_outbox_event (key, event_group, status) values ('x', 'g', 'done')",
    "insert into spark_outbox_event (key, event_group, attempts) values ('x', 'g', 9)",
    "insert into spark_outbox_event (key, event_group, created_at) values ('x', 'g', now())",
    "insert into spark_outbox_event (key, event_group, last_error) values ('x', 'g', '')",
    "insert into spark_outbox_event (id, key, event_group) values (5, 'x', 'g')",
    (
        "insert into spark_outbox_event (key, event_group) values ('key', 'g') "
        "on conflict (key) do update set event_group = 'other'"
    ),
    "select nextval('spark_outbox_event_id_seq')",
    "update spark_outbox_event set payload = '{}'",
    "update spark_outbox_event set event_group = 'other'",
    "update spark_outbox_event set key = 'other'",
    "delete from spark_outbox_delivery",
    "truncate spark_outbox_delivery",
    "update spark_outbox_delivery set handler = 'other'",
    "create role spark_test_other",
    "set session_replication_role = replica",
]
OUTBOX = "'spark_outbox_event'::regclass"
EMIT_MANY = (
    f"select spark_outbox_emit_many({OUTBOX}, '{{x}}', '{{g}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}')"
)
DENIED = {
    "nobody": [
        "select id from spark_outbox_event",
        "select id from spark_outbox_delivery",
        "select * from spark_outbox_status",
        "insert into spark_outbox_event (key, event_group) values ('x', 'g')",
        "select spark_emit('g', 'x')",
        f"select spark_outbox_is_same({OUTBOX}, 'key', 'g', '{{}}')",
        f"select spark_outbox_check_keys({OUTBOX}, '{{key}}')",
        EMIT_MANY,
        "select spark_outbox_close_circuit('h')",
    ],
    "emitter": [
        "select spark_outbox_close_circuit('h')",
        *(
            f"select {column} from spark_outbox_event"
            for column in ("*", "key", "event_group", "payload", "headers", "status", "last_error")
        ),
        "select id from spark_outbox_event where key = 'key'",
        "select id from spark_outbox_event for update",
        (
            "insert into spark_outbox_event (key, event_group) values ('key', 'g') "
            "on conflict (key) do nothing"
        ),
        "insert into spark_outbox_event (key, event_group) values ('x', 'g') returning payload",
        "copy spark_outbox_event to stdout",
        "update spark_outbox_event set status = 'done'",
        "select id from spark_outbox_delivery",
        "insert into spark_outbox_delivery (event_id, handler) select id, 'h' from spark_outbox_event",
        "update spark_outbox_delivery set status = 'pending'",
        "select * from spark_outbox_status",
        "set role spark_outbox_worker",
    ],
    "worker": [
        "update spark_outbox_event set headers = '{}'",
        "update spark_outbox_event set ordering_key = null",
        "update spark_outbox_event set created_at = now()",
        "insert into spark_outbox_delivery (id, event_id, handler) values (1, 1, 'h')",
        "update spark_outbox_delivery set event_id = 1",
        "set role spark_outbox_viewer",
    ],
    "viewer": [
        *(f"select {column} from spark_outbox_event" for column in ("*", "payload", "headers")),
        "select event from spark_outbox_event as event",
        "select id from spark_outbox_event for key share",
        "insert into spark_outbox_event (key, event_group) values ('x', 'g')",
        "select spark_emit('g', 'x')",
        f"select spark_outbox_is_same({OUTBOX}, 'key', 'g', '{{}}')",
        f"select spark_outbox_check_keys({OUTBOX}, '{{key}}')",
        EMIT_MANY,
        "select spark_outbox_close_circuit('h')",
        "update spark_outbox_event set status = 'done'",
        "insert into spark_outbox_delivery (event_id, handler) select id, 'h' from spark_outbox_event",
        "update spark_outbox_delivery set status = 'pending'",
        "set role spark_outbox_emitter",
        "set role spark_outbox_worker",
    ],
}


@pytest.mark.parametrize("kind", DENIED)
def test_nothing_else_is_allowed(logins, kind):
    emit("g", "key", secret=1)
    with logins.connect(kind) as mine:
        for statement in NOT_FOR_ANYBODY + DENIED[kind]:
            try:
                with mine.transaction():
                    mine.execute(statement)
            except InsufficientPrivilege:
                continue
            pytest.fail(f"{kind} may: {statement}")
    assert status() == "pending"


def test_everybody_may_do_with_the_readme_s_sql_what_their_role_is_for(logins):
    emit("order_paid", "order_paid_1")
    for sql in blocks("sql"):
        kind = "emitter" if "insert" in sql else "worker" if "update" in sql else "viewer"
        with logins.connect(kind) as mine:
            for statement in filter(str.strip, sql.split(";\n")):
                mine.execute(statement)
    assert status("import_1") == "pending"
    assert status("order_paid_1") == "discarded"


def test_the_worker_s_role_closes_circuits(logins):
    emit("g", "key", delay=3600)
    delivery = {"handler": "h", "error": "spark_outbox: not called, its circuit is open"}
    OutboxEvent.objects.get().deliveries.create(**delivery)
    with logins.connect("worker") as mine:
        assert mine.execute("select spark_outbox_close_circuit('h')").fetchone() == (1,)
    assert OutboxEvent.objects.get().available_at is None


def test_the_roles_take_from_everybody_what_a_restore_without_privileges_gives(logins):
    """`pg_dump --no-privileges` leaves out that some functions are not for everybody."""
    functions = "spark_outbox_is_same, spark_outbox_check_keys, spark_outbox_emit_many"
    is_same = f"select spark_outbox_is_same({OUTBOX}, 'key', 'g', '{{}}')"
    with connect() as admin, logins.connect("nobody") as nobody:
        admin.execute(f"grant execute on function {functions} to public")
        try:
            assert nobody.execute(is_same).fetchone() == (False,)
        finally:
            admin.execute(ROLES_SQL)
        for statement in (is_same, f"select spark_outbox_check_keys({OUTBOX}, '{{key}}')", EMIT_MANY):
            with pytest.raises(InsufficientPrivilege):
                nobody.execute(statement)


@pytest.mark.parametrize("kind", [*ROLES, "nobody"])
def test_the_checks_need_no_right_and_find_nothing(logins, kind):
    done = manage("check", "--database", "default", url=logins.url(kind))
    assert done.returncode == 0, done.stderr
    assert "no issues" in done.stdout


def test_a_sweep_needs_the_emitter_s_rights_and_those_to_read_the_instances(logins):
    make_challenge()
    OutboxEvent.objects.all().delete()
    done = manage("process_spark_sources", url=logins.url("emitter"))
    assert done.returncode == 0, done.stderr
    assert "challenges.Challenge: 1 instances, 1 events, 1 new" in done.stdout


def test_replays_and_rehearsals_need_the_worker_s_rights(logins):
    emit("probe", "key")
    worker = logins.url("worker")
    drain = partial(manage, "spark_worker", "--drain", url=worker)
    replay = partial(manage, "spark_replay", "--handler", "tests.probe.handlers.probe", url=worker)
    assert drain().returncode == 0
    assert "1 rows written to challenges_handled" in replay("--rehearse").stdout
    assert replay().stdout == "1 events are given to tests.probe.handlers.probe.\n"
    assert drain().returncode == 0
    assert (status(), Handled.objects.count()) == ("done", 2)
    refused = replay(url=logins.url("viewer"))
    assert refused.returncode == 1
    assert "permission denied" in refused.stderr


def test_the_worker_takes_over_what_another_had_detached_and_puts_back_what_nobody_handled(
    logins, flags
):
    worker = logins.url("worker")
    emit("probe", "unhandled")
    OutboxEvent.objects.update(status="unhandled")
    emit("probe_detached", "key", **flags.payload)
    emit("probe", "1", ordering_key="o")
    emit("probe", "2", ordering_key="o", delay=0.1)
    emit("nothing", "unknown")
    with WorkerProcess(url=worker) as first, WorkerProcess(url=worker) as second:
        first.wait_until_ready()
        second.wait_until_ready()
        pid = flags.wait()
        holder, other = (first, second) if first.owns(pid) else (second, first)
        holder.kill()
        flags.go.touch()
        wait_until_ended()
        other.signal(signal.SIGTERM)
        assert other.wait() == 0
        assert "denied" not in first.output + second.output
    assert set(OutboxEvent.objects.values_list("key", "status")) == {
        *((key, "done") for key in ("unhandled", "key", "1", "2")),
        ("unknown", "unhandled"),
    }


def test_a_worker_whose_role_may_not_says_what_it_lacks(logins):
    emit("probe", "key")
    with WorkerProcess("-v", "2", url=logins.url("viewer")) as worker:
        eventually(lambda: "permission denied for table spark_outbox_session" in worker.output)
    assert status() == "pending"


# Every privilege is needed


def emits():
    ready = NewRow("new", "g", "{}", "{}", None, None, None)
    yield partial(emitting.insert, ready)
    yield partial(emitting.insert, ready._replace(ordering_key="o"))
    yield partial(emitting.insert_many, [ready])
    yield partial(emitting.is_same, ready)
    yield partial(emitting.check_key, "key")


def works(event_id):
    yield partial(claiming.claim_ready, 0, 1)
    yield partial(settling.finish, [event_id], "done")
    result = Result("running")
    yield partial(settling.record_results, [(event_id, "h", *result)], worker="w", session=1)
    yield partial(settling.settle, [Fate(event_id, "pending", "x")])
    yield partial(detached.take_back, [Running(event_id, "h", 1)], to_settle=False)
    yield partial(replaying.owe_again, [event_id], "h", [(event_id, "other")])
    yield partial(sessions.enlist, 1, "w")
    yield partial(sessions.fallen_workers, 2)
    yield partial(sessions.note_call, [1], event_id, "h", 1)
    yield partial(sessions.dismiss, [1])
    yield from emits()


PRIVILEGES = """
select format('%%s on %%s', privilege_type, acl.oid::regclass)
from pg_class as acl cross join aclexplode(relacl) where grantee = %(role)s::regrole
union
select format('%%s (%%s) on %%s', privilege_type, attname, attrelid::regclass)
from pg_attribute cross join aclexplode(attacl) where grantee = %(role)s::regrole
union
select format('%%s on function %%s', privilege_type, acl.oid::regprocedure)
from pg_proc as acl cross join aclexplode(proacl) where grantee = %(role)s::regrole
union
select roleid::regrole::text from pg_auth_members where member = %(role)s::regrole
"""


def test_each_privilege_of_the_emitter_and_the_worker_is_needed(logins):
    event = emit("g", "key")

    def is_denied(act):
        try:
            with transaction.atomic():
                act(using="default")
        except ProgrammingError as error:
            if not isinstance(error.__cause__, InsufficientPrivilege):
                raise
            return True
        return False

    for kind, acts in (("emitter", list(emits())), ("worker", list(works(event.id)))):
        role = f"spark_outbox_{kind}"
        with connection.cursor() as cursor:
            cursor.execute(PRIVILEGES, {"role": role})
            privileges = [privilege for (privilege,) in cursor.fetchall()]
        assert len(privileges) > 8
        for privilege in [None, *privileges]:
            with transaction.atomic(), connection.cursor() as cursor:
                if privilege:
                    cursor.execute(f"revoke {privilege} from {role}")
                cursor.execute(f"set local role {logins.names[kind]}")
                denied = [is_denied(act) for act in acts]
                transaction.set_rollback(True)
            assert any(denied) == bool(privilege), privilege


# search_path


@pytest.fixture
def traps(logins):
    """A schema with functions and operators of the names that the outbox uses, which raise."""
    with connection.cursor() as cursor:
        cursor.execute("create schema traps")
        cursor.execute("grant usage on schema traps to public")
        for name, arguments, returns in (
            ("pg_notify", "text, text", "void"),
            ("pg_try_advisory_lock", "integer, integer", "boolean"),
            ("pg_advisory_unlock", "integer, integer", "boolean"),
            ("pg_try_advisory_xact_lock_shared", "integer, integer", "boolean"),
            ("pg_stat_get_xact_tuples_inserted", "oid", "bigint"),
            ("current_setting", "text", "text"),
            ("gen_random_uuid", "", "uuid"),
            ("equals", "text, text", "boolean"),
            ("equals", "jsonb, jsonb", "boolean"),
            ("greater", "bigint, integer", "boolean"),
            ("accepts", "text", "boolean"),
        ):
            cursor.execute(
                f"create function traps.{name}({arguments}) returns {returns} language plpgsql "
                "as 'begin raise exception $$trapped$$; end'"
            )
        for operator, function, left, right in (
            ("=", "equals", "text", "text"),
            ("=", "equals", "jsonb", "jsonb"),
            (">", "greater", "bigint", "integer"),
        ):
            cursor.execute(
                f"create operator traps.{operator} "
                f"(function = traps.{function}, leftarg = {left}, rightarg = {right})"
            )
        cursor.execute(
            "create domain traps.text as pg_catalog.text check (traps.accepts(value)); "
            "create table traps.spark_outbox_event (like public.spark_outbox_event including all)"
        )
    yield "traps"
    with connection.cursor() as cursor:
        cursor.execute("drop schema traps cascade")


@pytest.mark.parametrize("mode", ["gated", "always"])
@pytest.mark.parametrize("sleeping", [False, True])
def test_no_search_path_makes_the_outbox_run_what_is_not_its_own(
    logins, traps, wake_mode, mode, sleeping
):
    wake_mode(mode)
    emit("g", "key", secret=1)
    with (
        connect() as listener,
        logins.connect("emitter", options="-csearch_path=traps,pg_catalog,public") as victim,
    ):
        for trap in ("select pg_notify('a', 'b')", "select 'a'::pg_catalog.text = 'b'::text"):
            with pytest.raises(psycopg.Error, match="trapped"):
                victim.execute(trap)
        listener.execute("listen spark_outbox")
        if sleeping:
            listener.execute(waking.TAKE_S)
        victim.execute("insert into public.spark_outbox_event (key, event_group) values ('1', 'g')")
        for key in ("2", None):
            assert victim.execute("select public.spark_emit('g', %s)", [key]).fetchone()[0]
        outbox = "'public.spark_outbox_event'::pg_catalog.regclass"
        same = f"select public.spark_outbox_is_same({outbox}, 'key', 'g', '{{\"secret\": 1}}')"
        assert victim.execute(same).fetchone() == (True,)
        assert notifications(listener) == (3 if sleeping or mode == "always" else 0)
        assert victim.execute("select public.spark_emit('g', 'key')").fetchone() == (None,)
        many = "'{3, key}', '{g, g}', '{null, null}', '{null, null}', '{o, o}', '{}', '{}'"
        many = f"select public.spark_outbox_emit_many({outbox}, {many})".replace("null", '"{}"')
        assert victim.execute(many).fetchone() == (1,)
        assert victim.execute("select public.spark_outbox_ids_are_behind()").fetchone() == (False,)
    assert OutboxEvent.objects.count() == 5


def test_nor_does_what_somebody_has_put_into_its_own_schema(logins):
    """Up to PostgreSQL 14 everybody may create in public."""
    with connection.cursor() as cursor:
        cursor.execute(
            "create function public.accepts(text) returns boolean language plpgsql "
            "as 'begin raise exception $$trapped$$; end'; "
            "create domain public.text as pg_catalog.text check (public.accepts(value))"
        )
    try:
        with logins.connect("emitter") as victim:
            assert victim.execute("select spark_emit('g', null)").fetchone()[0]
    finally:
        with connection.cursor() as cursor:
            cursor.execute("drop domain public.text; drop function public.accepts")


def test_the_outbox_may_be_in_any_schema(logins):
    """And be written to from a session whose search_path leads to another outbox."""
    here = make_conninfo(conninfo(), options="-csearch_path=shop")
    worker = logins.url("worker", options="-csearch_path=shop")
    with connect() as admin:
        admin.execute("create schema shop")
        try:
            done = manage("migrate", url=here)
            assert done.returncode == 0, done.stderr
            admin.execute("set search_path = shop")
            admin.execute(ROLES_SQL)
            admin.execute(PROJECT.format(logins.names["worker"]))
            with (
                WorkerProcess("--poll-interval", "3600", url=worker) as process,
                logins.connect("emitter") as elsewhere,
            ):
                process.wait_until_ready()
                wait_until_asleep()
                elsewhere.execute("select shop.spark_emit('probe', 'key')")
                done = "select true from spark_outbox_event where status = 'done'"
                eventually(lambda: admin.execute(done).fetchone())
            assert admin.execute("select count(*) from challenges_handled").fetchone() == (1,)
        finally:
            admin.execute("drop schema shop cascade")
    assert not OutboxEvent.objects.exists()


# What is never logged, on no level

SECRET = "x7Qw-correct-horse"


@pytest.fixture
def refused_rows():
    """A deferred constraint that refuses some rows, and quotes them."""
    with connection.cursor() as cursor:
        cursor.execute(
            "create function refuse() returns trigger language plpgsql as "
            "$$ begin raise exception 'refused: %', new.note; end $$; "
            "create constraint trigger refuse after insert on challenges_handled "
            "deferrable initially deferred for each row when (new.handler = 'refused') "
            "execute function refuse()"
        )
    yield
    with connection.cursor() as cursor:
        cursor.execute("drop function refuse cascade")


@pytest.mark.parametrize(
    ("verbosity", "debug"), [("1", "0"), ("3", "0"), ("3", "1")], ids=["default", "verbose", "debug"]
)
def test_whatever_happens_to_an_event_its_data_and_tracebacks_stay_out_of_the_log(
    logins, refused_rows, verbosity, debug
):
    for way in WAYS:
        emit(f"leak_{way}", f"{way} {SECRET}", secret=SECRET, headers={"trace": SECRET})
    emit("nothing", SECRET, secret=SECRET)
    with connection.cursor() as cursor:
        cursor.execute(
            """
            insert into spark_outbox_event (key, event_group, payload) values
                ('unreadable', 'leak_raise', jsonb_build_object('secret', jsonb_build_object(
                    '$', jsonb_build_array('nope', %s))))
            """,
            [SECRET],
        )
    with WorkerProcess("-v", verbosity, "--no-reload", url=logins.url("worker"), DEBUG=debug) as worker:
        worker.wait_until_ready()
        wait_until_ended()
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        output = worker.output
    assert SECRET not in output
    assert "Traceback" not in output
    assert "Handler leak raise on event" in output
    assert {way: status(f"{way} {SECRET}") for way in WAYS} == {
        way: ended for way, (_, ended) in WAYS.items()
    }
    # The tables have it all.
    told = Delivery.objects.filter(status="failed", traceback__contains=SECRET)
    assert set(told.values_list("handler", flat=True)) >= {
        f"leak {way}" for way in ("raise", "chain", "value", "unique", "commit", "batch", "async")
    }
    assert SECRET in OutboxEvent.objects.get(key="unreadable").last_error


def test_a_worker_that_dies_of_a_bug_says_where_and_no_more():
    emit("sabotage", "key", secret=SECRET)
    with WorkerProcess("-v", "3") as worker:
        eventually(lambda: "The worker process dies of ValueError at " in worker.output)
        eventually(lambda: "ERROR A worker process died of exit code 1" in worker.output)
        assert "in _write" in worker.output
        assert SECRET not in worker.output


def test_a_source_that_raises_is_reported_without_what_it_said(own_registry):
    challenge = make_challenge(SECRET)

    @source(Challenge)
    def bad(challenge):
        raise ValueError(challenge.title)

    def report(**options):
        err = io.StringIO()
        with pytest.raises(CommandError):
            call_command("process_spark_sources", stderr=err, stdout=io.StringIO(), **options)
        return err.getvalue()

    assert report().startswith(f"challenges.Challenge {challenge.pk}: ")
    assert "raised ValueError at " in report()
    assert SECRET not in report()
    assert f"ValueError: {SECRET}" in report(traceback=True)


def test_what_goes_wrong_after_the_commit_neither_hurts_the_caller_nor_tells_of_rows(
    own_registry, settings, caplog
):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}
    own_registry.add_handler(lambda event: None, group="", name="h")
    with connection.cursor() as cursor:
        cursor.execute(
            "create function refuse() returns trigger language plpgsql as "
            "$$ begin raise exception 'refused: %', new.key; end $$; "
            "create trigger refuse before update on spark_outbox_event "
            "for each row execute function refuse()"
        )
    try:
        with transaction.atomic():
            emit("g", SECRET)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("drop function refuse cascade")
    assert status(SECRET) == "pending"
    assert (
        "can't be settled, and not be marked as failed either (ProgrammingError P0001)"
        in (caplog.messages[-1])
    )
    assert SECRET not in caplog.text
    assert not any(record.exc_info for record in caplog.records)
    Worker().drain()
    assert status(SECRET) == "done"


def test_events_that_cannot_even_be_claimed_after_the_commit_are_left_to_the_next_call(
    own_registry, settings, caplog, logins
):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}
    own_registry.add_handler(lambda event: None, group="", name="h")
    with connection.cursor() as cursor:
        try:
            with transaction.atomic():
                emit("g", SECRET)
                cursor.execute(f"set role {logins.names['emitter']}")
        finally:
            cursor.execute("reset role")
    assert status(SECRET) == "pending"
    assert caplog.messages[-1].startswith(
        "Events of database default could not be handled after the commit (ProgrammingError: permission"
    )
    assert SECRET not in caplog.text
    Worker().drain()
    assert status(SECRET) == "done"
