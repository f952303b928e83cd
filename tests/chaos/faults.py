"""The faults of production. Each is a function of the rig, and is over when it returns."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

import psycopg

from spark_outbox.migrations._postgresql import SQL
from tests.chaos.rig import Member, Rig
from tests.chaos.server import CONNECTIONS
from tests.tools import eventually

Fault = Callable[[Rig], None]
FAULTS: list[Fault] = []
NO_BOUNCER = "not possible here: there is no pgbouncer"


def fault(function: Fault) -> Fault:
    FAULTS.append(function)
    return function


# Processes


def victim(rig: Rig, members: list[Member]) -> tuple[Member, int]:
    """Choose a process: a worker's supervisor, or one of its children."""
    member = rig.random.choice(members)
    return member, rig.random.choice(member.pids())


def kill(rig: Rig, members: list[Member], times: int) -> None:
    for _ in range(times):
        member, pid = victim(rig, members)
        member.signal(pid, signal.SIGKILL)
        rig.counts["kills"] += 1
        time.sleep(rig.random.uniform(0, 0.3))


@fault
def kill_workers(rig: Rig) -> None:
    """kill -9 of workers and their supervisors."""
    kill(rig, rig.workers, 8)


@fault
def kill_writers(rig: Rig) -> None:
    """kill -9 of writers."""
    kill(rig, rig.writers, 3)


@fault
def kill_everyone(rig: Rig) -> None:
    """kill -9 of all workers at the same moment."""
    for member in rig.workers:
        member.kill()
        rig.counts["kills"] += 1


def freeze(rig: Rig, members: list[Member]) -> None:
    frozen = [victim(rig, members) for _ in range(2)]
    for member, pid in frozen:
        member.signal(pid, signal.SIGSTOP)
    time.sleep(rig.random.uniform(0.5, 3))
    for member, pid in frozen:
        member.signal(pid, signal.SIGCONT)


@fault
def freeze_workers(rig: Rig) -> None:
    """SIGSTOP of workers, and SIGCONT."""
    freeze(rig, rig.workers)


@fault
def freeze_writers(rig: Rig) -> None:
    """SIGSTOP of writers, and SIGCONT."""
    freeze(rig, rig.writers)


@fault
def storm(rig: Rig) -> None:
    """One SIGTERM after the other, to all processes."""
    for _ in range(20):
        member, pid = victim(rig, rig.members)
        member.signal(pid, signal.SIGTERM)
        time.sleep(rig.random.uniform(0, 0.1))


@fault
def deploy(rig: Rig) -> None:
    """Stop one worker after the other, and start it with the other release."""
    for member in rig.workers:
        release = "old" if member.environment.get("CHAOS_RELEASE") == "new" else "new"
        member.restart(CHAOS_RELEASE=release)


# Connections


def terminate(rig: Rig, condition: str, times: int) -> None:
    sql = (
        "select pg_terminate_backend(pid) from (select pid from pg_stat_activity"
        f" where usename = 'chaos' and ({condition}) order by random() limit 1) as one"
    )
    for _ in range(times):
        rig.counts["terminated"] += len(rig.server.query(sql))
        time.sleep(rig.random.uniform(0, 0.2))


@fault
def terminate_workers(rig: Rig) -> None:
    """pg_terminate_backend on workers' connections."""
    terminate(rig, "starts_with(application_name, 'spark_worker')", 8)


@fault
def terminate_listeners(rig: Rig) -> None:
    """pg_terminate_backend on connections of sleeping workers."""
    terminate(
        rig,
        "application_name = 'chaos_listener'"
        " or pid in (select pid from pg_locks where locktype = 'advisory' and classid = 7531002)",
        8,
    )


@fault
def terminate_writers(rig: Rig) -> None:
    """pg_terminate_backend on any connection."""
    terminate(rig, "true", 8)


@fault
def terminate_in_commit(rig: Rig) -> None:
    """pg_terminate_backend on connections that are in COMMIT."""
    sql = (
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where usename = 'chaos' and state = 'active' and query ilike 'commit%'"
    )
    found = 0
    deadline = time.monotonic() + 5
    with rig.server.superuser() as connection:
        while found < 10 and time.monotonic() < deadline:
            found += len(connection.execute(sql).fetchall())
    rig.counts["terminated in COMMIT"] += found


@fault
def refuse(rig: Rig) -> None:
    """All of max_connections taken, and the workers' connections terminated."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(psycopg.OperationalError):
            for _ in range(CONNECTIONS):
                stack.enter_context(psycopg.connect(rig.server.url()))
        for _ in range(10):
            terminate(rig, "starts_with(application_name, 'spark_worker')", 1)
            with contextlib.suppress(psycopg.OperationalError):
                stack.enter_context(psycopg.connect(rig.server.url()))


# The server


@contextlib.contextmanager
def down(rig: Rig, mode: str) -> Iterator[None]:
    rig.server.stop(mode)
    try:
        yield
    finally:
        rig.server.start()


@fault
def restart_fast(rig: Rig) -> None:
    """PostgreSQL restarted in fast mode."""
    with down(rig, "fast"):
        pass


@fault
def restart_immediate(rig: Rig) -> None:
    """PostgreSQL restarted in immediate mode: it recovers from its log."""
    with down(rig, "immediate"):
        pass


@fault
def crash(rig: Rig) -> None:
    """kill -9 of a backend, after which the server restarts all others."""
    rig.server.kill()
    rig.counts["kills"] += 1


@fault
def outage(rig: Rig) -> None:
    """PostgreSQL stopped for 30 s."""
    with down(rig, "fast"):
        time.sleep(30)


# The network


@fault
def reset(rig: Rig) -> None:
    """All connections through the proxy reset, several times."""
    for _ in range(5):
        rig.proxy.reset()
        time.sleep(rig.random.uniform(0, 0.5))


@fault
def stall(rig: Rig) -> None:
    """All bytes through the proxy are held back, then released."""
    rig.proxy.stall()
    time.sleep(rig.random.uniform(1, 4))
    rig.proxy.resume()


@fault
def black_hole(rig: Rig) -> None:
    """Bytes through the proxy are lost, and the connections with them."""
    rig.proxy.black_hole()
    time.sleep(rig.random.uniform(1, 4))
    rig.proxy.heal()


@fault
def slow(rig: Rig) -> None:
    """Each chunk of bytes through the proxy is late."""
    rig.proxy.slow(0.02)
    time.sleep(3)
    rig.proxy.heal()


@fault
def no_route(rig: Rig) -> None:
    """The proxy resets all connections, also new ones."""
    rig.proxy.refuse()
    rig.proxy.reset()
    time.sleep(2)
    rig.proxy.heal()


@fault
def kill_pgbouncer(rig: Rig) -> None:
    """kill -9 of pgbouncer."""
    if rig.bouncer is None:
        rig.say(NO_BOUNCER)
        return
    rig.bouncer.kill()
    time.sleep(rig.random.uniform(0, 1))
    rig.bouncer.start()
    rig.counts["kills"] += 1


@fault
def freeze_pgbouncer(rig: Rig) -> None:
    """SIGSTOP of pgbouncer, and SIGCONT: connections stay open, and nothing answers."""
    if rig.bouncer is None:
        rig.say(NO_BOUNCER)
        return
    with rig.bouncer.frozen():
        time.sleep(rig.random.uniform(1, 4))


# Limits, locks and maintenance


@contextlib.contextmanager
def setting(rig: Rig, **settings: str) -> Iterator[None]:
    """Change settings of the role, and terminate its sessions, so that new ones have the settings."""
    try:
        for name, value in settings.items():
            rig.server.query(f"alter role chaos set {name} = '{value}'")
        terminate_all(rig)
        yield
    finally:
        rig.server.query("alter role chaos reset all")
        terminate_all(rig)


def terminate_all(rig: Rig) -> None:
    rig.counts["terminated"] += len(
        rig.server.query(
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'chaos'"
        )
    )


@fault
def statement_timeout(rig: Rig) -> None:
    """A statement_timeout so short that statements fail at random."""
    with setting(rig, statement_timeout="2ms"):
        time.sleep(4)


@fault
def lock_timeout(rig: Rig) -> None:
    """A lock_timeout, and locks on rows and tables that others need."""
    with setting(rig, lock_timeout="30ms"):
        for _ in range(4):
            lock(rig, "update chaos_account set balance = balance", 0.3)
            lock(rig, "lock table spark_outbox_event", 0.3)


def lock(rig: Rig, sql: str, seconds: float) -> None:
    with rig.server.superuser() as connection, connection.transaction():
        connection.execute(sql)
        time.sleep(seconds)


@fault
def lock_tables(rig: Rig) -> None:
    """The outbox locked, as a migration does."""
    lock(rig, "lock table spark_outbox_event, spark_outbox_delivery", 2)


@fault
def full_disk(rig: Rig) -> None:
    """No space left on the outbox's disk."""
    if rig.server.disk is None:
        rig.say("not possible here: no disk could be mounted")
        return
    error = "No space left on device"
    before = rig.server.errors()[error]
    with rig.server.full_disk(), contextlib.suppress(AssertionError):
        eventually(lambda: rig.server.errors()[error] > before + 10, patience=20)


@fault
def vacuum_full(rig: Rig) -> None:
    """VACUUM FULL and ANALYZE of the outbox."""
    for table in ("spark_outbox_event", "spark_outbox_delivery"):
        rig.server.query(f"vacuum (full, analyze) {table}")


@fault
def reindex(rig: Rig) -> None:
    """REINDEX TABLE CONCURRENTLY of the outbox."""
    rig.server.query("reindex table concurrently spark_outbox_event")


# Indexes that a migration may replace. A table keeps their definitions meanwhile.
CLAIMED_FROM = "'{spark_outbox_event_due, spark_outbox_event_ordered, spark_outbox_event_ordered_due}'"
TAKE_AWAY = f"""
create table chaos_index as select indexdef from pg_indexes where indexname = any({CLAIMED_FROM});
drop index spark_outbox_event_due, spark_outbox_event_ordered, spark_outbox_event_ordered_due;
alter table spark_outbox_session rename to chaos_session;
"""
PUT_BACK = """
alter table chaos_session rename to spark_outbox_session;
truncate spark_outbox_session;
do $$
declare
    definition text;
begin
    for definition in select indexdef from chaos_index loop
        execute definition;
    end loop;
end
$$;
drop table chaos_index;
"""


@fault
def migrate(rig: Rig) -> None:
    """A half migrated outbox, without its trigger, functions, sessions and some indexes.

    The views stay: without them there is no outbox to a worker that starts, which then ends.
    """

    def run(statements: list[str]) -> bool:
        """Run statements in one transaction, as the owner of the outbox; return whether it succeeded."""
        try:
            with rig.server.superuser() as connection, connection.transaction():
                connection.execute("set local role chaos")
                for statement in statements:
                    connection.execute(statement)
        except psycopg.OperationalError:
            return False
        return True

    def read(*names: str) -> list[str]:
        return [(SQL / f"0001_{name}.sql").read_text() for name in names]

    back = read("circuits_reverse", "emitting_reverse", "wake_reverse")
    eventually(partial(run, [*back, TAKE_AWAY]), patience=120)
    time.sleep(rig.random.uniform(0, 2))
    eventually(partial(run, [PUT_BACK, *read("wake", "emitting", "circuits")]), patience=120)
    eventually(partial(rig.manage, "migrate", "--no-input", "spark_outbox"), patience=120)


@fault
def old_snapshot(rig: Rig) -> None:
    """A transaction that keeps its snapshot, as pg_dump does."""
    with rig.server.superuser() as connection, connection.transaction():
        connection.execute("set transaction isolation level repeatable read")
        connection.execute("select count(*) from spark_outbox_event")
        time.sleep(3)


@fault
def prepared(rig: Rig) -> None:
    """A prepared transaction that has emitted, and commits late."""
    with rig.server.superuser() as connection:
        connection.execute("set role chaos")
        connection.execute("begin")
        key = f"prepared-{rig.random.random()}"
        connection.execute("insert into chaos_order (key, \"group\") values (%s, 'chaos_plain')", [key])
        connection.execute(
            "insert into spark_outbox_event (key, event_group) values (%s, 'chaos_plain')", [key]
        )
        connection.execute("prepare transaction 'chaos'")
        time.sleep(2)
        connection.execute("commit prepared 'chaos'")


@fault
def sweep(rig: Rig) -> None:
    """process_spark_sources, which yields every key once more."""
    eventually(lambda: rig.manage("process_spark_sources"), patience=120)


LONGEST_RUN = """
select min(id) - 1 as before, count(*) from (
    select id, id - row_number() over (order by id) as run from (
        select id from spark_outbox_event order by id desc limit 20000
    ) as latest
) as numbered
group by run order by count(*) desc limit 1
"""


def collisions(rig: Rig) -> int:
    return sum(len(file.read_text().splitlines()) for file in rig.files.glob("*.collided"))


@fault
def lagging_sequence(rig: Rig) -> None:
    """The sequence of ids set back, as by a restore or a switch to a replica that lags."""
    for member in rig.writers:
        member.signal(member.process.pid, signal.SIGUSR1)
    time.sleep(0.5)  # from now on, events have new ordering keys
    ((before, _),) = rig.server.query(LONGEST_RUN)
    sequence = "pg_get_serial_sequence('spark_outbox_event', 'id')"
    noticed = collisions(rig)
    rig.server.query(f"select setval({sequence}, %s)", [before])
    eventually(lambda: collisions(rig) > noticed)
    with rig.server.superuser() as connection, connection.transaction():
        connection.execute("lock table spark_outbox_event in share row exclusive mode")
        connection.execute(f"select setval({sequence}, (select max(id) from spark_outbox_event))")
