"""Rows that emit() would not have written: each fails alone, with a reason, and stops no worker."""

import gc
import io
import json
import re
from base64 import b64encode
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from psycopg import errors

from spark_outbox import emit, emit_many, handler
from spark_outbox.errors import DuplicateKey
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.processes.guard import Guard, OwnNotes
from spark_outbox.worker import invoke
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.events.rows import insert, update
from tests.probe.models import Named
from tests.test_readme import blocks
from tests.tools import (
    WorkerProcess,
    connect,
    eventually,
    make_challenge,
    note,
    statuses,
    wait_until_asleep,
    wait_until_ended,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)

SECRET = "s3cret"
"""Is in every hostile payload, and must be in no log."""


def tag(*content):
    return {"payload": json.dumps({"note": SECRET, "a": {"$": content}})}


def model(label, pk, alias="default"):
    return tag("model", label, pk, alias)


def nested(depth):
    return f'{{"note": "{SECRET}", "a": {"[" * depth}{"]" * depth}}}'


def text(value):
    return {"$": ["text", b64encode(value).decode()]}


CHALLENGE = "challenges.challenge"

# What can't be read, and what its last_error says.
UNREADABLE = {
    "null": ({"payload": "null"}, "The payload must be an object in JSON, not null."),
    "number": ({"payload": "1e400"}, "must be an object in JSON, not a number."),
    "text": ({"payload": f'"{SECRET}"'}, "must be an object in JSON, not text."),
    "array": ({"payload": f'["{SECRET}"]'}, "must be an object in JSON, not an array."),
    "true": ({"payload": "true"}, "must be an object in JSON, not true or false."),
    "headers": ({"headers": f'["{SECRET}"]'}, "The headers must be an object in JSON"),
    "headers with a bad tag": ({"headers": '{"a": {"$": ["no"]}}'}, "A tag can't be read"),
    "nested": ({"payload": nested(3000)}, "recursion depth|nested too deeply"),
    "nested a little less": ({"payload": nested(1200)}, "recursion depth|nested too deeply"),
    "huge integer": (
        {"payload": f'{{"note": "{SECRET}", "a": 1{"0" * 5000}}}'},
        r"The payload can't be parsed: Exceeds the limit \(4300 digits\)",
    ),
    "unknown tag": (tag("no such tag", 1), "A tag can't be read: .*no such tag"),
    "tag that is no list": ({"payload": '{"a": {"$": 5}}'}, "A tag can't be read"),
    "tag without content": (tag("date"), "A tag can't be read"),
    "tag in its own name": (tag({"$": ["date", "2026-01-01"]}, 1), "A tag can't be read"),
    "date out of range": (tag("date", "99999-01-01"), "A tag can't be read: .*99999"),
    "malformed datetime": (tag("datetime", "yesterday"), "A tag can't be read: .*yesterday"),
    "timedelta out of range": (tag("timedelta", [10**12, 0, 0]), "A tag can't be read"),
    "malformed Decimal": (tag("decimal", "1,5"), "A tag can't be read"),
    "malformed UUID": (tag("uuid", "zz"), "A tag can't be read: .*badly formed"),
    "no base64": (tag("bytes", "?"), "A tag can't be read"),
    "text that is no UTF-8": (tag("text", "/w=="), "A tag can't be read: .*invalid start byte"),
    "unhashable key": (tag("dict", [[[], 1]]), "A tag can't be read: .*unhashable"),
    "sNaN in a set": (tag("set", [{"$": ["decimal", "sNaN"]}]), "A tag can't be read: .*NaN"),
    "infinite float": (tag("float", "1e400"), "A tag can't be read: .*no finite number"),
    "fold of a date": (tag("date", "2026-01-01", 1), "A tag can't be read"),
    "model that is not installed": (model("sites.site", 1), "'sites.site', which is not installed"),
    "module": (model("os.path", "/etc/passwd"), "'os.path', which is not installed"),
    "label that is none": (model("a.b.c.d", 1), "'a.b.c.d', which is not installed"),
    "label that is no text": (model([5], 1), "which is not installed"),
    "very long label": (model("x" * 50_000, 1), "'xxx.*, which is not installed"),
    "abstract model": (model("probe.nameless", 1), "'probe.nameless', which is not installed"),
    "unknown database": (model(CHALLENGE, 1, "no"), "the database 'no': no such alias"),
    "key that is null": (model(CHALLENGE, None), "None is no key of challenges.Challenge"),
    "key of a wrong type": (model(CHALLENGE, "x"), "'x' is no key of challenges.Challenge"),
    "key that is a list": (model(CHALLENGE, [1]), r"\[1\] is no key of challenges.Challenge"),
    "key beyond bigint": (model(CHALLENGE, 2**63), "is no key of challenges.Challenge"),
    "key with an infinite float": (model(CHALLENGE, {"$": ["float", "inf"]}), "A tag can't be read"),
    "key with a malformed tag": (model(CHALLENGE, {"$": ["uuid", "x"]}), "A tag can't be read"),
    "key that no int() survives": (
        model(CHALLENGE, {"$": ["decimal", "1e999999999999"]}),
        "is no key of challenges.Challenge: It is a Decimal",
    ),
    "key that is a reference": (
        model(CHALLENGE, {"$": ["model", CHALLENGE, 1, "default"]}),
        f"a reference to '{CHALLENGE}' as the key of another",
    ),
    "key with a NUL": (model("probe.named", text(b"a\0b")), "is no key of probe.Named"),
    "key with a lone surrogate": (
        model("probe.named", text(b"\xed\xa0\x80")),
        "is no key of probe.Named",
    ),
    "key that is too long": (model("probe.named", "x" * 51), "is no key of probe.Named"),
    "reference of three parts": (tag("model", CHALLENGE, 1), "A tag can't be read"),
}

# What another attempt might mend, and what its last_error says in the end.
NOT_THERE = {
    "row that is gone": (model(CHALLENGE, 2**63 - 1), "challenges.Challenge .* is gone"),
    "proxy": (model("probe.nicknamed", "nobody"), "probe.Nicknamed 'nobody' .* is gone"),
    "model without a table": (model("probe.nowhere", 1), 'relation "probe_nowhere" does not exist'),
}

# Odd, but nothing is wrong with them.
ODD = {
    "group with a newline": {"event_group": "g\n"},
    "group with more": {"event_group": "g\nERROR all is lost\x1b[31m"},
    "keys of maximal length": {"key": "\U0001f525" * 255, "ordering_key": "\U0001f525" * 255},
    "lowest id": {"id": -(2**63) + 1},
    "highest id": {"id": 2**63 - 1},
    "attempts below 0": {"attempts": -(2**31)},
    "attempts without number": {"attempts": 2**31 - 1},
    "created in infinity": {"created_at": "infinity"},
    "created before time": {"created_at": "-infinity"},
    "created at the end of time": {"created_at": "294276-12-31 23:59:59+00"},
    "available before time": {"available_at": "-infinity"},
    "available before our time": {"available_at": "4000-01-01 BC"},
    "finished before its time": {"finished_at": "-infinity"},
    "headers of all kinds": {"headers": '{"a": 1, "b": null, "c": [{}]}'},
    "huge numbers": {"payload": '{"a": [1e400, 1e-400, -1e4000, 123456789.123456789e300]}'},
    "no numbers": {"payload": '{"a": ["NaN", "Infinity", "-0"]}'},
    "tag with more keys": {"payload": '{"a": {"$": ["no such tag"], "b": 1}}'},
    "name of ours": {"payload": '{"$": 1, "group": 2, "key": 3, "__class__": 4, "load": 5}'},
    "nested, but not too deeply": {"payload": nested(150)},
    "1 MB": {"payload": json.dumps({"a": ["x" * 1_000_000]})},
}

REFUSED = {
    "empty group": ({"event_group": ""}, errors.CheckViolation),
    "group of 1 MB": ({"event_group": "g" * 2**20}, errors.CheckViolation),
    "key that is too long": ({"key": "k" * 256}, errors.CheckViolation),
    "no key": ({"key": None}, errors.NotNullViolation),
    "ordering_key that is too long": ({"ordering_key": "o" * 256}, errors.CheckViolation),
    "unknown status": ({"status": "lost"}, errors.CheckViolation),
    "NUL": ({"payload": '{"a": "\\u0000"}'}, errors.UntranslatableCharacter),
    "lone surrogate": ({"payload": '{"a": "\\ud800"}'}, errors.InvalidTextRepresentation),
    "number that numeric can't hold": ({"payload": '{"a": 1e400000}'}, errors.NumericValueOutOfRange),
    "NaN": ({"payload": '{"a": NaN}'}, errors.InvalidTextRepresentation),
    "nested beyond the server's stack": ({"payload": nested(10**5)}, errors.StatementTooComplex),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_table_itself_refuses(name):
    columns, error = REFUSED[name]
    with pytest.raises(error):
        insert(**columns)


def read_all(event):
    for document in (event.payload, event.headers):
        json.dumps(dict(document), default=str)
    repr((event, event.created_at, event.available_at))
    Handled.objects.create(key=event.key, handler="good")


def read_list(events):
    for event in events:
        read_all(event)


async def read_later(event):
    json.dumps(dict(event.payload), default=str)
    await Handled.objects.acreate(key=event.key, handler="good")


KINDS = {
    "plain": (read_all, {}),
    "list": (read_list, {"batch": 30}),
    "async": (read_later, {}),
    "detached": (read_all, {"atomic": False}),
}


@pytest.fixture(params=KINDS)
def reading(request, own_registry):
    """A handler of each kind that reads all of an event, and is not tried a third time."""
    function, options = KINDS[request.param]
    handler("^g", name="reads", max_attempts=2, backoff=0.01, **options)(function)
    return request.param


def test_each_bad_row_fails_alone_and_says_why(reading, caplog):
    caplog.set_level("DEBUG", logger="spark_outbox")
    challenge, named = make_challenge(), Named.objects.create(name="a name")
    OutboxEvent.objects.all().delete()
    bad = {**UNREADABLE, **NOT_THERE}
    rows = [*((name, columns) for name, (columns, _) in bad.items()), *ODD.items()]
    for number, (name, columns) in enumerate(rows):
        emit_many(
            {"group": "g", "key": f"good {number} {n}", "row": [challenge, named], "n": n}
            for n in range(4)
        )
        insert(**{"key": name, **columns})
    with worker_thread():
        wait_until_ended()
        wait_until_asleep()
    ended = statuses()
    assert {key for key, status in ended.items() if status != "done"} == set(bad)
    assert {ended[name] for name in bad} == {"failed"}
    reasons = dict(OutboxEvent.objects.filter(status="failed").values_list("key", "last_error"))
    for name, (_, reason) in bad.items():
        assert re.search(reason, last_line(reasons[name])), (name, reasons[name][-500:])
    assert set(Delivery.objects.exclude(status="done").values_list("status", flat=True)) == {"failed"}
    assert Handled.objects.filter(key__startswith="good").count() == 4 * len(rows)
    assert SECRET not in caplog.text
    assert "failed (" not in caplog.text  # the database: no batch had to be handled again


def test_a_row_that_was_put_right_is_handled(own_registry):
    """As the README says it: the reason, the correction, and the cookbook's recipe."""
    (why,) = [sql for sql in blocks("sql") if "as reason" in sql]
    (again,) = [sql for sql in blocks("sql") if "spark_retry(" in sql]
    own_registry.add_handler(note, group="^order")
    insert(event_group="order_paid", payload="null")
    Worker().drain()
    with connect() as other:
        ((*_, reason),) = other.execute(why).fetchall()
        assert reason.endswith(": The payload must be an object in JSON, not null.\n")
        other.execute("update spark_outbox_event set payload = '{}'")
        other.execute(again.replace("order_paid_1", "bad"))
    Worker().drain()
    assert statuses() == {"bad": "done"}


def test_a_group_with_a_newline_is_matched_as_python_does(own_registry):
    calls = []
    for pattern in ("^g$", r"^g\Z", "^g.$", "^g\n"):
        own_registry.add_handler(lambda _, p=pattern: calls.append(p), group=pattern, name=pattern)
    insert(event_group="g\n")
    Worker().drain()
    assert calls == ["^g$", "^g\n"]


def last_line(error):
    """Return the message of a traceback: what a person looks at first."""
    return error.rstrip().rpartition("\nspark_outbox")[2] or error


# Large payloads

LARGE = {
    "50 MB": "jsonb_build_object('a', repeat('x', 50000000))",
    "50 MB of numbers": "jsonb_build_object('a', array_fill(1, array[4000000]))",
    "text that no text can hold": "jsonb_build_object('a', repeat(chr(1), 200000000))",
}


def insert_large(key, payload, column="payload"):
    update(
        f"insert into spark_outbox_event (key, event_group, {column}) values (%s, 'probe', {payload})",
        key,
    )


def memory(pid, what):
    """Return how many MB a process has now, VmRSS, or has had at the most, VmHWM."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) // 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory in /proc")
def test_large_rows_fail_or_are_handled_and_the_memory_of_the_worker_comes_back():
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        emit("probe", "first")
        eventually(lambda: Handled.objects.filter(key="first").exists())
        pid = int(Handled.objects.get().note)
        before = memory(pid, "VmRSS")
        for key, payload in LARGE.items():
            insert_large(key, payload)
        insert_large("headers of 50 MB", LARGE["50 MB"], "headers")
        for number in range(10):
            insert_large(f"25 MB {number}", "jsonb_build_object('a', repeat('x', 25000000))")
        emit("probe", "last")
        eventually(lambda: set(statuses().values()) == {"done", "failed"})
        wait_until_asleep()
        assert int(Handled.objects.get(key="last").note) == pid  # the process has lived through it
        peak, after = memory(pid, "VmHWM"), memory(pid, "VmRSS")
        output = worker.output
    print(f"{before} MB before, {peak} MB at the most, {after} MB after")
    failed = dict(OutboxEvent.objects.filter(status="failed").values_list("key", "last_error"))
    assert failed.keys() == {*LARGE, "headers of 50 MB"}
    for reason in failed.values():
        assert re.search(r"bytes are too many for the .*: no more than 33,554,432 are read", reason)
    assert output.count("failed for good") == len(failed)
    assert "xxx" not in output
    assert peak < before + 200
    assert after < before + 50


class Note(OwnNotes):
    """What is in hand when an alarm rings."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def take_in_hand(self, *called):
        self.taken.append(called)


@pytest.mark.usefixtures("unhurried")
def test_a_payload_that_takes_too_long_to_decode_is_given_up_in_the_name_of_its_event(
    own_registry, monkeypatch
):
    """Keys whose hashes are all the same: each is compared with all before it."""
    monkeypatch.setattr(invoke, "READ_LIMIT", 0.1)
    own_registry.add_handler(note, group="", name="h")
    emit("g", "before")
    pairs = [[number * (2**61 - 1), 0] for number in range(30_000)]
    insert(payload=json.dumps({"a": {"$": ["dict", pairs]}}))
    event_id = OutboxEvent.objects.get(key="bad").id
    noted = Note()
    gc.disable()  # hypothesis listens to it, and there an alarm that rings is swallowed
    try:
        Worker(guard=Guard(noted)).handle_batch()
    finally:
        gc.enable()
    assert statuses() == {"before": "done", "bad": "pending"}
    delivery = Delivery.objects.get()
    assert "takes more than 0.1 s to decode" in delivery.error
    assert noted.taken[-1] == ((event_id, 0),)


# Whoever else meets them


def test_they_do_not_stop_emit_replay_or_a_sweep(own_registry):
    from tests.challenges.sources import events_from_challenge

    calls = []
    odd = {"created_at": "infinity", "available_at": "-infinity", "attempts": 2**31 - 1, "id": -7}
    done = {"status": "done", "event_group": "g"}
    insert(key="challenge_created_1", payload="null", **{**odd, **done})
    insert(key="no tag", **{**tag("no such tag", 1), **done})
    insert(key="fine", **done)
    with connect() as other:
        other.execute("update spark_outbox_event set created_at = '-infinity' where key = 'no tag'")

    assert emit("g", "challenge_created_1") is None
    with pytest.raises(DuplicateKey):
        emit("g", "no tag", on_duplicate="check", a=1)
    own_registry.add_source(events_from_challenge, model=type(make_challenge(pk=1)))
    out = io.StringIO()
    call_command("process_spark_sources", stdout=out)
    assert "1 instances, 1 events, 0 new" in out.getvalue()

    own_registry.add_handler(lambda event: calls.append(event.key), group="^g", name="new")
    with pytest.raises(CommandError, match="failed on 2 events"):
        call_command("spark_replay", "--handler", "new", "--rehearse", stdout=out)
    assert "The payload must be an object" in out.getvalue()
    assert "A tag can't be read" in out.getvalue()
    call_command("spark_replay", "--handler", "new", "--yes", stdout=out)
    assert "3 events are given to new" in out.getvalue()
    with worker_thread():
        eventually(lambda: sorted(statuses().values()) == ["done", "failed", "failed"])
    assert calls == ["fine", "fine"]
