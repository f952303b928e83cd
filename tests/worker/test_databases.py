"""Databases that don't fit are refused, and one that is away for a while is waited for."""

import pytest
from django.db import OperationalError, connection, connections, transaction

from spark_outbox import checks, conf, emit, handler
from spark_outbox.errors import SettingsError
from spark_outbox.worker import bounds
from spark_outbox.worker.claims import Claims
from spark_outbox.worker.loop import Worker
from tests.tools import (
    connect,
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


@pytest.fixture
def leads(monkeypatch):
    """What makes the alias `other` lead elsewhere."""
    other = connections["other"]

    def lead(**changed):
        other.close()
        for name, value in changed.items():
            monkeypatch.setitem(other.settings_dict, name, value)

    yield lead
    other.close()


both = pytest.mark.django_db(transaction=True, databases=["default", "other"])


@both
@pytest.mark.parametrize("listen", ["other", {"default": "other"}])
def test_a_worker_refuses_to_listen_in_another_database(own_registry, settings, leads, listen):
    leads(NAME="postgres")
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": listen}
    own_registry.add_handler(note, group="", atomic=False)
    emit("g", "key")
    with pytest.raises(SettingsError, match="'other' for 'default', which has another outbox"):
        Worker().run()
    with pytest.raises(SettingsError, match="another outbox"):
        Worker().drain()
    assert (status(), handled()) == ("pending", [])


@both
def test_the_same_database_by_another_search_path_has_another_outbox(leads):
    leads(OPTIONS={"options": "-c search_path=pg_catalog"})
    with pytest.raises(SettingsError, match="another outbox"):
        bounds.check_direct("default", "other")


@both
def test_each_database_has_a_direct_connection_of_its_own(own_registry, settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": {"default": None, "other": "default"}}
    own_registry.add_handler(note, group="", name="h", atomic=False)
    with worker_thread(using="other"):
        wait_until_asleep()
        emit("g", "key", using="other")
        wait_until_done(1)
    assert handled() == ["key"]
    assert [conf.current().direct(alias) for alias in ("default", "third")] == [None, "third"]


@both
def test_a_direct_connection_that_leads_elsewhere_since_a_failover_is_waited_for(
    own_registry, settings, leads
):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": "other"}
    own_registry.add_handler(note, group="")
    name = connections["other"].settings_dict["NAME"]
    with worker_thread() as worker, connect() as server:
        leads(NAME="postgres")
        server.execute(
            "select pg_terminate_backend(pid, 10000) from pg_stat_activity "
            "where starts_with(application_name, 'spark_worker ')"
        )
        emit("g", "key")
        eventually(lambda: worker._session._failures >= 2)
        leads(NAME=name)
        wait_until_done(1)


def test_aliases_that_do_not_exist_are_found_by_check(settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": {"default": "direct", "shop": None}}
    found = checks.check_settings()
    assert [error.id for error in found] == ["spark_outbox.E002"] * 2
    assert ["direct" in found[0].msg, "shop" in found[1].msg]


def test_a_database_without_autocommit_is_refused(own_registry, monkeypatch):
    make_challenge()
    monkeypatch.setitem(connection.settings_dict, "AUTOCOMMIT", False)
    for work in (Worker().run, Worker().drain):
        with pytest.raises(SettingsError, match="has AUTOCOMMIT off"):
            work()
    (error,) = checks.check_autocommit()
    assert error.id == "spark_outbox.E004"


def test_a_callback_that_turns_autocommit_off_stops_nobody(own_registry):
    @handler("", name="h")
    def run(event):
        note(event)
        transaction.on_commit(lambda: transaction.set_autocommit(False))

    with worker_thread():
        for number in range(3):
            emit("g", f"{number}")
            wait_until_done(number + 1)
    assert set(statuses().values()) == {"done"}


def test_a_worker_that_reaches_the_database_and_can_claim_nothing_tries_less_and_less_often(
    own_registry, monkeypatch, caplog
):
    def fail(*_, **__):
        raise OperationalError("out of shared memory")

    def pauses():
        return [record.seconds for record in caplog.records if "trying again" in record.message]

    monkeypatch.setattr(Claims, "next", fail)
    with worker_thread():
        eventually(lambda: len(pauses()) >= 4)
    assert pauses()[3] > 2 * pauses()[0]


def test_an_outbox_that_is_being_restored_is_waited_for(own_registry):
    own_registry.add_handler(note, group="")
    with worker_thread() as worker, connect() as server:
        server.execute("alter view spark_outbox_status rename to away")
        try:
            server.execute(
                "select pg_terminate_backend(pid, 10000) from pg_stat_activity "
                "where starts_with(application_name, 'spark_worker ')"
            )
            eventually(lambda: worker._session._failures >= 2)
        finally:
            server.execute("alter view away rename to spark_outbox_status")
        emit("g", "key")
        wait_until_done(1)
    assert handled() == ["key"]
