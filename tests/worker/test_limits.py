"""Limits that the server keeps: on a handler's statements, and on the silence of a worker."""

import pytest
from django.db import connection, transaction

from spark_outbox import emit, handler
from spark_outbox.models import Delivery
from spark_outbox.processes.guard import Guard
from spark_outbox.registry.policy import Policy
from spark_outbox.store import resting, settling
from spark_outbox.worker.loop import Worker
from tests.tools import note, status, statuses, wait_until_asleep, wait_until_done, work, worker_thread
from tests.worker.sql import run, show

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("own_session")]


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


@pytest.mark.parametrize(
    ("direct", "timeouts", "seconds"),
    [
        ("", {"plain": 10, "async": 100}, 40),  # its calls outlive the batch
        (None, {"plain": 10, "async": 100}, 165),  # the batch waits for its calls
        (None, {"plain": 10, "async": None}, None),
        (None, {"plain": None, "async": 100}, None),
        (None, {"async": 60}, 105),
    ],
)
def test_the_server_bears_silence_for_as_long_as_a_batch_may_wait(
    own_registry, settings, direct, timeouts, seconds
):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": direct}

    async def call(event):
        pass

    for name, timeout in timeouts.items():
        function = call if name == "async" else note
        own_registry.add_handler(function, group="", name=name, policy=Policy(timeout=timeout))
    assert Worker(guard=Guard())._session._longest_silence() == seconds
    assert Worker()._session._longest_silence() is None  # nothing would interrupt them
