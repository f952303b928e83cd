"""Each role of deploy/roles.sql has no privilege more than it needs, and needs each that it has."""

from functools import partial

import pytest
from django.db import ProgrammingError, connection, transaction
from psycopg.errors import InsufficientPrivilege

from spark_outbox import emit
from spark_outbox.models import OutboxEvent
from spark_outbox.operating import look
from spark_outbox.store import (
    claiming,
    detached,
    emitting,
    pausing,
    pruning,
    replaying,
    sessions,
    settling,
)
from spark_outbox.store.connection import run_query
from spark_outbox.store.detached import Running
from spark_outbox.store.emitting import NewRow
from spark_outbox.worker.outcome import Fate, Result
from tests.store.logins import ROLES_SQL
from tests.tools import connect, status

pytestmark = pytest.mark.django_db(transaction=True)


# Nothing else is allowed

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
    "alter function spark_emit(text, text, jsonb, jsonb) reset search_path",
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
    "update spark_outbox_pause set why = 'other'",
    "insert into spark_outbox_pause (kind, name, paused_by) values ('group', 'g', 'somebody else')",
    "create role spark_test_other",
    "set session_replication_role = replica",
]
OUTBOX = "'spark_outbox_event'::regclass"
EMIT_MANY = (
    f"select spark_outbox_emit_many({OUTBOX}, '{{x}}', '{{g}}', '{{}}', null, null, null, null, null)"
)
PRUNE = f"select spark_outbox_prune({OUTBOX}, 'done', 'g', now(), 1)"
FORGET_KEYS = f"select spark_outbox_forget_keys({OUTBOX}, 0, now(), 1)"
PAUSES = ["select spark_pause('group', 'g')", "select spark_resume('group', 'g')"]
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
        PRUNE,
        FORGET_KEYS,
        "select spark_outbox_close_circuit('h')",
        *PAUSES,
        "select * from spark_outbox_pauses",
    ],
    "emitter": [
        PRUNE,
        FORGET_KEYS,
        "select spark_outbox_close_circuit('h')",
        *PAUSES,
        "select * from spark_outbox_pause",
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
        *PAUSES,
        "update spark_outbox_event set headers = '{}'",
        "update spark_outbox_event set ordering_key = null",
        "update spark_outbox_event set created_at = now()",
        "insert into spark_outbox_delivery (id, event_id, handler) values (1, 1, 'h')",
        "update spark_outbox_delivery set event_id = 1",
        "update spark_outbox_event set digest = 1",
        "delete from spark_outbox_event",
        "set role spark_outbox_viewer",
    ],
    "operator": [
        *(f"select {column} from spark_outbox_event" for column in ("*", "payload", "headers")),
        "insert into spark_outbox_event (key, event_group) values ('x', 'g')",
        "update spark_outbox_event set digest = null",
        "update spark_outbox_delivery set error = ''",
        PRUNE,
        FORGET_KEYS,
        EMIT_MANY,
        "set role spark_outbox_worker",
    ],
    "viewer": [
        *(
            f"select {column} from spark_outbox_event"
            for column in ("*", "payload", "headers", "digest")
        ),
        "select event from spark_outbox_event as event",
        "select id from spark_outbox_event for key share",
        "insert into spark_outbox_event (key, event_group) values ('x', 'g')",
        "select spark_emit('g', 'x')",
        f"select spark_outbox_is_same({OUTBOX}, 'key', 'g', '{{}}')",
        f"select spark_outbox_check_keys({OUTBOX}, '{{key}}')",
        EMIT_MANY,
        PRUNE,
        FORGET_KEYS,
        "select spark_outbox_close_circuit('h')",
        *PAUSES,
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


def test_the_roles_take_from_everybody_what_a_restore_without_privileges_gives(logins):
    """`pg_dump --no-privileges` leaves out that some functions are not for everybody."""
    functions = (
        "spark_outbox_is_same, spark_outbox_check_keys, spark_outbox_emit_many, spark_outbox_prune, "
        "spark_outbox_forget_keys"
    )
    is_same = f"select spark_outbox_is_same({OUTBOX}, 'key', 'g', '{{}}')"
    with connect() as admin, logins.connect("nobody") as nobody:
        admin.execute(f"grant execute on function {functions} to public")
        try:
            assert nobody.execute(is_same).fetchone() == (False,)
        finally:
            admin.execute(ROLES_SQL)
        check = f"select spark_outbox_check_keys({OUTBOX}, '{{key}}')"
        for statement in (is_same, check, EMIT_MANY, PRUNE, FORGET_KEYS):
            with pytest.raises(InsufficientPrivilege):
                nobody.execute(statement)


# Every privilege is needed


def emits():
    ready = NewRow("new", "g", "{}", "{}", None, None, None)
    yield partial(emitting.insert, ready)
    yield partial(emitting.insert, ready._replace(ordering_key="o"))
    yield partial(emitting.insert, ready._replace(key_is_generated=True))
    yield partial(emitting.insert_many, [ready])
    yield partial(emitting.is_same, ready)
    yield partial(emitting.check_key, "key")
    yield partial(run_query, "select spark_emit('g', null)")


def works(event_id):
    yield partial(claiming.claim_ready, 0, 1)
    yield partial(settling.finish, [event_id], "done")
    result = Result("running")
    yield partial(settling.record_results, [(event_id, "h", *result)], worker="w", session=1)
    result = Result("pending", "an error")
    yield partial(settling.record_results, [(event_id, "f", *result)], worker="w", session=1)
    yield partial(settling.settle, [Fate(event_id, "pending", "x")])
    yield partial(detached.take_back, [Running(event_id, "h", 1)], to_settle=False)
    yield partial(replaying.owe_again, [event_id], "h")
    yield partial(sessions.enlist, 1, "w", version="1", is_direct=True, groups=None, handlers=["h"])
    yield partial(sessions.fallen_workers, 2)
    yield partial(sessions.note_call, [1], event_id, "h", 1)
    yield partial(sessions.dismiss, [1])
    yield partial(pruning.oldest, ["done"])
    yield partial(pruning.oldest_snapshot, seconds=1, xids=1)
    yield partial(pruning.prune, "done", "g", seconds=1, most=1)
    yield partial(pruning.forget_keys, 0, seconds=1, most=1)
    yield pausing.paused
    yield pausing.ended
    yield partial(pausing.put_back, "h", "mark", limit=1)
    yield look.figures
    yield from emits()


def looks():
    for view in ("events", "status", "pauses", "failures", "workers", "snapshots", "health"):
        yield partial(run_query, f"select * from spark_outbox_{view}")
    yield partial(
        run_query, "select * from spark_outbox_delivery, spark_outbox_session, spark_outbox_pause"
    )
    yield partial(run_query, "select spark_explain('key')")


def pauses():
    yield partial(pausing.pause, "group", "g", "why")
    yield partial(pausing.resume, "group", "g")


def repairs():
    for call in (
        "retry('key')",
        "retry_failed(fingerprint => 'x')",
        "discard('key', 'why')",
        "replay('done', 'h')",
    ):
        yield partial(run_query, f"select spark_{call}")
    yield partial(run_query, "select spark_outbox_close_circuit('h')")


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
    emit("g", "done")
    OutboxEvent.objects.filter(key="done").update(status="done")

    def is_denied(act):
        try:
            with transaction.atomic():
                act(using="default")
        except ProgrammingError as error:
            if not isinstance(error.__cause__, InsufficientPrivilege):
                raise
            return True
        return False

    columns = (
        "id, key, event_group, status, attempts, available_at, ordering_key, created_at, finished_at, "
        "last_error, key_is_generated"
    )
    sees = partial(run_query, f"select {columns} from spark_outbox_event")
    for kind, acts in (
        ("emitter", list(emits())),
        ("worker", [*works(event.id), *repairs()]),
        ("viewer", [sees, *looks()]),
        ("operator", [*repairs(), *pauses()]),
    ):
        role = f"spark_outbox_{kind}"
        with connection.cursor() as cursor:
            cursor.execute(PRIVILEGES, {"role": role})
            privileges = [privilege for (privilege,) in cursor.fetchall()]
        assert len(privileges) > 8
        for privilege in [None, *privileges]:
            with transaction.atomic(), connection.cursor() as cursor:
                if privilege:
                    everybody = ", public" if privilege.startswith("EXECUTE") else ""
                    cursor.execute(f"revoke {privilege} from {role}{everybody}")
                cursor.execute(f"set local role {logins.names[kind]}")
                denied = [is_denied(act) for act in acts]
                transaction.set_rollback(True)
            assert any(denied) == bool(privilege), privilege
