"""What the commands answer to settings, databases and events that they can do nothing with."""

import os

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from psycopg.conninfo import make_conninfo

from spark_outbox import emit
from spark_outbox.errors import NotMigrated
from spark_outbox.models import OutboxEvent
from spark_outbox.testing import drain
from tests.tools import WorkerProcess, conninfo, manage

pytestmark = pytest.mark.django_db(transaction=True)

WRONG = {"DJANGO_SETTINGS_MODULE": "tests.wrong"}


@pytest.mark.parametrize(
    "command",
    [
        ["spark_worker"],
        ["spark_worker", "--skip-checks"],
        ["spark_replay", "--handler", "crash"],
        ["process_spark_sources"],
        ["spark_bench", "--skip-checks"],
    ],
)
def test_all_wrong_settings_are_told_at_once_and_in_sentences(command):
    done = manage(*command, **WRONG, WRONG="yes")
    assert done.returncode == os.EX_CONFIG
    for sentence in (
        "SPARK_OUTBOX['BATCH_SIZE'] is 0; it must be a whole number, 1 or more.",
        "SPARK_OUTBOX['WAKE'] is 'sometimes'; it must be 'gated' or 'always' or 'never'.",
        "SPARK_OUTBOX has no setting 'BACKOF'. Did you mean 'BACKOFF'?",
    ):
        assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", [["spark_worker"], ["spark_replay", "--handler", "crash"], ["process_spark_sources"]]
)
def test_a_database_that_can_have_no_outbox_is_refused(command):
    done = manage(*command, "--database", "lite", **WRONG)
    assert done.returncode == os.EX_CONFIG
    assert "Database 'lite' is sqlite, and an outbox needs PostgreSQL." in done.stderr
    assert "--database: default." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--drain", "--once"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dbname": "no_such_database"}, 'database "no_such_database" does not exist'),
        ({"user": "no_such_user"}, '"no_such_user"'),
        ({"host": "/nonexistent"}, "No such file or directory"),
    ],
)
def test_who_waits_for_the_end_is_told_that_the_database_cannot_be_used(option, wrong, message):
    with WorkerProcess(option, url=make_conninfo(conninfo(), **wrong)) as worker:
        assert worker.wait() == 1
        assert "Database 'default' can't be used: OperationalError: " in worker.output
        assert message in worker.output
        assert "Traceback" not in worker.output


def test_replay_says_why_a_key_is_not_replayed():
    for key in ("failed", "done", "waiting"):
        emit("probe_crash", key)
    emit("other", "elsewhere")
    OutboxEvent.objects.filter(key="failed").update(status="failed")
    OutboxEvent.objects.exclude(key__in=["failed", "waiting"]).update(status="done")
    keys = ["failed", "done", "waiting", "elsewhere", "nowhere"]
    done = manage("spark_replay", "--handler", "crash", "--key", *keys)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 events are given to crash.\n"
    assert done.stderr.splitlines() == [
        "failed is left out: it has failed, and is not done. To try it again, make it pending.",
        "waiting is left out: it is pending: its handlers are still to be called.",
        "elsewhere is left out: its group 'other' is not one of the handler's, '^probe_crash$'.",
        "nowhere is left out: there is no such event.",
    ]


def test_replay_asks_before_it_gives_all_of_a_handlers_events():
    for key in ("one", "two"):
        emit("probe_crash", key)
    OutboxEvent.objects.update(status="done")
    refused = manage("spark_replay", "--handler", "crash")
    assert refused.returncode == 1
    assert "There is no terminal to ask on: give --yes, or --rehearse." in refused.stderr
    assert OutboxEvent.objects.filter(status="done").count() == 2
    done = manage("spark_replay", "--handler", "crash", "--yes")
    assert done.stdout == "2 events are given to crash.\n"
    assert OutboxEvent.objects.filter(status="pending").count() == 2


def test_replay_of_nothing_says_what_it_looked_for():
    emit("probe_crash", "key")
    done = manage("spark_replay", "--handler", "crash", "--group", "^x")
    assert done.stdout == "0 events are given to crash.\n"
    assert done.stderr == (
        "No such event is done in the groups the handler's, '^probe_crash$', and --group '^x'.\n"
    )


COMMANDS = [
    ["spark_status"],
    ["spark_events"],
    ["spark_retry", "--failed", "--yes"],
    ["spark_prune", "--dry-run"],
    ["spark_pause"],
    ["spark_catalogue"],
]


@pytest.fixture
def no_outbox():
    """The outbox is out of the search_path."""
    with connection.cursor() as cursor:
        cursor.execute("set search_path = pg_catalog")
    yield
    connection.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_if_the_database_has_no_outbox(no_outbox, command):
    with pytest.raises(CommandError, match="Database 'default' has no outbox") as caught:
        call_command(*command, skip_checks=True)
    assert caught.value.returncode == os.EX_CONFIG


def test_a_drain_says_if_the_database_has_no_outbox(no_outbox):
    with pytest.raises(NotMigrated, match=r"Run: manage\.py migrate spark_outbox"):
        drain()


def test_a_command_says_in_a_sentence_that_the_database_cannot_be_reached():
    done = manage("spark_status", DATABASE_URL=make_conninfo(conninfo(), host="/nonexistent"))
    assert done.returncode == 1
    assert "CommandError: Database 'default' can't be used: OperationalError: " in done.stderr
    assert "Traceback" not in done.stderr
