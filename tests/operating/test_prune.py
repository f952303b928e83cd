"""spark_prune: what it prunes, what it asks and says, and what it refuses."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading

import pytest
from django.core.management import call_command
from django.db import connections

from spark_outbox import emit, emit_many
from spark_outbox.management.commands import spark_prune
from spark_outbox.models import OutboxEvent
from spark_outbox.operating import prune
from spark_outbox.operating.prune import Choice
from spark_outbox.worker import retention
from tests.postgres import ROOT
from tests.tools import connect, conninfo, eventually, manage, statuses

pytestmark = pytest.mark.django_db(transaction=True)


def end_all(*, days, status="done", group=""):
    with connect() as other:
        other.execute(
            "update spark_outbox_event set status = %s, finished_at = now() - make_interval(days => %s) "
            "where event_group ~ %s",
            [status, days, group],
        )


def run(*arguments):
    return manage("spark_prune", *arguments, url=conninfo())


def is_pruned(key):
    return OutboxEvent.objects.get(key=key).digest is not None


@pytest.fixture
def past():
    """Of each of two groups one event that ended ten days ago, and one that ended 20 days ago."""
    for group, days in (("order", 20), ("mail", 20), ("order_new", 10), ("mail_new", 10)):
        emit(group, group)
        end_all(days=days, group=f"^{group}$")


def test_a_dry_run_counts_and_changes_nothing(past):
    done = run("--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "state  group  older than  events",
        "done   mail          14d       1",
        "done   order         14d       1",
    ]
    assert not OutboxEvent.objects.filter(digest__isnull=False).exists()


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ([], {"order", "mail"}),
        (["--group", "^order"], {"order"}),
        (["--older-than", "9d"], {"order", "mail", "order_new", "mail_new"}),
        (["--older-than", "216h", "--group", "^mail"], {"mail", "mail_new"}),
        (["--older-than", "30d"], set()),
        (["--state", "failed", "--older-than", "1m"], set()),
        (["--state", "done"], {"order", "mail"}),
    ],
)
def test_events_can_be_chosen(past, options, keys):
    done = run("--yes", *options)
    assert done.returncode == 0, done.stderr
    assert {key for key in statuses() if is_pruned(key)} == keys
    if keys:
        assert (
            f"{len(keys)} events are pruned: {len(keys)} keep their keys, 0 are deleted." in done.stdout
        )
    else:
        assert done.stdout == "No event is old enough to be pruned.\n"


def test_what_is_kept_for_ever_is_pruned_only_if_it_is_named(past):
    end_all(days=20, status="failed", group="mail")
    assert run("--yes", "--older-than", "1d").returncode == 0
    assert not is_pruned("mail")
    assert run("--yes", "--older-than", "1d", "--state", "failed").returncode == 0
    assert is_pruned("mail")


def test_a_group_that_is_kept_for_ever_must_be_named(past, settings):
    settings.SPARK_OUTBOX = {"RETENTION": {"groups": {"^mail": None}}}
    for choice, groups in (
        (Choice(older_than=1), {"order", "order_new"}),
        (Choice(older_than=1, states=("done",)), {"order", "order_new"}),
        (Choice(older_than=1, group="^mail$"), {"mail"}),
    ):
        assert {portion.group for portion in choice.portions(using="default")} == groups
    settings.SPARK_OUTBOX = {"RETENTION": None}
    assert Choice(older_than=1).portions(using="default") == []
    named = Choice(older_than=1, group="^order$").portions(using="default")
    assert [portion.group for portion in named] == ["order"]


def test_keys_are_forgotten_with_a_warning(past):
    with connect() as other:
        other.execute("update spark_outbox_event set created_at = now() - interval '20 days'")
    assert run("--yes").returncode == 0
    done = run("--dry-run", "--forget-keys-older-than", "2w")
    assert "2 keys of pruned events are to be forgotten" in done.stdout
    assert "is handled once more" in done.stderr
    done = run("--yes", "--forget-keys-older-than", "2w")
    assert set(statuses()) == {"order_new", "mail_new"}
    assert "2 events are pruned: 0 keep their keys, 2 are deleted." in done.stdout


def test_json_is_one_document(past):
    emit("order")
    end_all(days=20)
    done = run("--json", "--yes")
    assert json.loads(done.stdout) == {
        "portions": [
            {"state": "done", "group": group, "seconds": 1209600.0, "events": events, "more": False}
            for group, events in (("mail", 1), ("mail_new", 1), ("order", 2), ("order_new", 1))
        ],
        "keys": None,
        "dry_run": False,
        "stripped": 4,
        "deleted": 1,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--older-than", "30"], "'30' is no duration; write 30d, 12h or 90m"),
        (["--older-than", "0d"], "'0d' is no duration"),
        (["--older-than", "d"], "'d' is no duration"),
        (["--state", "pending"], "invalid choice: 'pending'"),
        (["--group", "("], "'(' is no regular expression: missing )"),
        (["--database", "nope"], "DATABASES has no 'nope'"),
        ([], "There is no terminal to ask on: give --yes, or --dry-run."),
    ],
)
def test_what_makes_no_sense_is_refused(past, arguments, message):
    done = run(*arguments)
    assert message in done.stderr
    assert done.returncode > 0
    assert not OutboxEvent.objects.filter(digest__isnull=False).exists()


def start(*arguments):
    """Run the command on a terminal; return the process and the terminal's descriptor."""
    here, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "manage.py", "spark_prune", *arguments],
        stdin=there,
        stdout=there,
        stderr=there,
        env={**os.environ, "DATABASE_URL": conninfo()},
        start_new_session=True,
    )
    os.close(there)
    return process, here


def read_until(descriptor, text):
    said = ""
    while text not in said:
        try:
            said += os.read(descriptor, 4096).decode()
        except OSError:  # the process has ended
            break
    assert text in said, said
    return said


@pytest.mark.parametrize(("answer", "count", "code"), [("n\n", 0, 1), ("\n", 0, 1), ("y\n", 2, 0)])
def test_on_a_terminal_it_asks(past, answer, count, code):
    process, terminal = start()
    assert "14d" in read_until(terminal, "Prune them? [y/N]")
    os.write(terminal, answer.encode())
    read_until(terminal, "Nothing was changed." if code else "2 events are pruned")
    assert process.wait(30) == code
    os.close(terminal)
    assert OutboxEvent.objects.filter(digest__isnull=False).count() == count


def test_ctrl_c_stops_it_at_once_and_another_run_goes_on(past):
    with connect() as other:
        other.execute(
            "insert into spark_outbox_event (key, event_group, status, finished_at) "
            "select number, 'many', 'done', now() - interval '20 days' "
            "from generate_series(1, 50000) as number"
        )
    process, terminal = start("--yes")
    read_until(terminal, " of ")
    process.send_signal(signal.SIGINT)
    read_until(terminal, "run it again to go on.")
    assert process.wait(30) == 130
    os.close(terminal)
    assert 0 < OutboxEvent.objects.filter(digest__isnull=False).count() < 50_000
    assert run("--yes").returncode == 0
    assert OutboxEvent.objects.filter(digest__isnull=False).count() == 50_002


def test_it_waits_and_says_for_whom_while_an_old_snapshot_is_held(past, monkeypatch):
    monkeypatch.setattr(retention, "PATIENCE", 0)
    monkeypatch.setattr(spark_prune, "HOLDER_PAUSE", 0.01)
    out, errors = io.StringIO(), io.StringIO()

    def prune_past():
        call_command("spark_prune", yes=True, stdout=out, stderr=errors)
        connections.close_all()

    with connect(autocommit=False, application_name="a report") as holder:
        holder.execute("set transaction isolation level repeatable read")
        holder.execute("select count(*) from spark_outbox_event")
        thread = threading.Thread(target=prune_past)
        thread.start()
        name = rf"Waiting: session {holder.info.backend_pid} \(.*a report.*\) holds a snapshot"
        eventually(lambda: re.search(name, errors.getvalue()))
        assert not OutboxEvent.objects.filter(digest__isnull=False).exists()
    thread.join(30)
    assert "2 events are pruned" in out.getvalue()
    assert errors.getvalue().count("Waiting") == 1


def test_counts_have_a_bound(past, monkeypatch):
    monkeypatch.setattr(prune, "COUNTED", 2)
    emit_many({"group": "order", "key": f"{number}"} for number in range(5))
    end_all(days=20, group="^order$")
    (portion,) = prune.Choice(group="^order$").portions(using="default")
    assert prune.count(portion, using="default") == 3
