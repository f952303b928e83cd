"""The wake protocol is model-checked: tests/model/wake.pml, by spin; and it is a model of this code."""

import os
import re
import shutil
import subprocess

import pytest
from django.db import connection

from spark_outbox.store import claiming, resting, waking
from spark_outbox.worker.claims import Claims
from spark_outbox.worker.cycle import Cycle
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.session import Session
from spark_outbox.worker.sleep import Sleep
from spark_outbox.worker.wake import Wake
from tests.postgres import ROOT
from tests.statements import Statements
from tests.tools import eventually, wait_until_asleep, worker_thread

MODEL = ROOT / "tests" / "model" / "wake.pml"
TEXT = MODEL.read_text()
SWITCHES = set(re.findall(r"^#(?:ifn?def |(?:el)?if defined\()(\w+)", TEXT, re.MULTILINE))
BROKEN = sorted(SWITCHES - {"WORKERS", "EMITTERS", "SUPERVISED", "FAILURES"})

OF_THE_WATCH = {"NO_PASS_ON"}

needs_spin = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")) and "SPARK_OUTBOX_TEST_MODEL" not in os.environ,
    reason="needs spin and gcc: apt-get install spin gcc",
)


def check(folder, *switches, breadth_first=False):
    """Let spin visit every state of the model, or search until there is an error; return its report."""

    def run(*command):
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("spin", "-a", *(f"-D{switch}" for switch in switches), MODEL)
    order = ["-DBFS"] if breadth_first else []
    run("gcc", "-O1", "-DSAFETY", "-DNOREDUCE", *order, "-o", "pan", "pan.c")
    report = run("./pan", "-m12000000")
    assert "max search depth too small" not in report
    return report


# No event is lost


@pytest.mark.model
@needs_spin
@pytest.mark.parametrize(
    "switches",
    [
        ("WORKERS=2", "EMITTERS=2"),
        ("WORKERS=3", "EMITTERS=1"),
        ("EMITTERS=1", "FAILURES"),
        ("WORKERS=2", "EMITTERS=2", "SUPERVISED=2"),
        ("WORKERS=3", "EMITTERS=1", "SUPERVISED=2"),
        ("EMITTERS=1", "FAILURES", "SUPERVISED=2"),
    ],
    ids=" ".join,
)
def test_no_event_is_lost_in_any_state_of_the_protocol(tmp_path, switches):
    report = check(tmp_path, *switches)
    assert "errors: 0" in report
    assert "Search not completed" not in report
    if "FAILURES" in switches:
        endless = ["Emitter", *(["Supervisor"] if "SUPERVISED=2" in switches else [])]
        assert unreached(report) == {
            "Monitor": ["assert((pending==locked))", "-end-"],
            **{process: ["-end-"] for process in endless},
        }


def unreached(report):
    """Return the steps of each process that never happened."""
    found = {}
    for name, steps in re.findall(r"unreached in proctype (\w+)\n((?:\t.*\n)+)", report):
        if never := re.findall(r'state \d+, "(.*)"', steps):
            found[name] = never
    return found


# The model bites


@pytest.mark.model
@needs_spin
@pytest.mark.parametrize("switch", BROKEN)
def test_the_protocol_with_a_mistake_in_it_loses_an_event(tmp_path, switch):
    more = ["SUPERVISED=2"] if switch in OF_THE_WATCH else []
    report = check(tmp_path, switch, "EMITTERS=1", "FAILURES", *more, breadth_first=True)
    assert "errors: 1" in report
    assert "assertion violated (pending==locked)" in report
    assert (tmp_path / "wake.pml.trail").exists()


def test_these_mistakes_are_among_them():
    assert {"NO_SECOND_LOOK", "K_AFTER_CHECK", "NO_PROBE", "K_TO_STATEMENT_END"} <= set(BROKEN)


# It is a model of this code


def marks(kind):
    return re.findall(rf"\b{kind}: ([\w()]+)", TEXT.partition("*/")[2])


def test_the_names_in_the_model_are_those_of_the_code():
    names = re.findall(r"\b(Worker|Sleep|Cycle|Session|Wake|Claims)\.(\w+)", TEXT)
    assert len(names) >= 10
    owners = {each.__name__: each for each in (Worker, Sleep, Cycle, Session, Wake, Claims)}
    for owner, name in names:
        assert hasattr(owners[owner], name)


@pytest.mark.django_db
def test_the_trigger_takes_the_steps_of_the_model_in_their_order():
    with connection.cursor() as cursor:
        cursor.execute(
            "select pg_get_triggerdef(t.oid) || prosrc "
            "from pg_trigger as t join pg_proc as p on p.oid = tgfoid "
            "where tgrelid = 'spark_outbox_event'::regclass and tgname = 'spark_outbox_wake'"
        )
        (source,) = cursor.fetchone()
    source = re.sub("--.*", "", source)
    for lock, number in {"K": 7531001, "S": 7531002}.items():
        source = re.sub(
            rf"\({number}, \(+'spark_outbox_event'::regclass\)::oid\)::integer\)", f"({lock})", source
        )
    assert re.findall(r"pg_\w*(?:advisory\w*\([KS]\)|notify)", source) == marks("trigger")


@pytest.mark.django_db(transaction=True)
def test_a_worker_takes_the_steps_of_the_model_in_their_order(own_registry):
    loop = marks("sql")
    texts = vars(claiming) | vars(resting) | vars(waking)
    beginnings = {name: texts[name].partition("{")[0] for name in loop}
    beginnings["CLAIM_READY"] = f"execute {claiming.PREPARED_CLAIM}"

    def steps():
        found = []
        for sql in statements.sql:
            plain = sql.replace("public.spark_outbox", "spark_outbox")  # workers address their tables
            places = [(plain.index(text), name) for name, text in beginnings.items() if text in plain]
            found += [name for _, name in sorted(places)]
        return found

    with Statements() as statements, worker_thread():
        wait_until_asleep()
        eventually(lambda: steps()[-1:] == loop[-1:])
        with connection.cursor() as cursor:
            cursor.execute("notify spark_outbox")
        eventually(lambda: len(steps()) >= 2 * len(loop) - 2)
        assert steps() == [*loop[2:], *loop]  # at first there is nothing to leave
