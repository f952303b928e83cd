"""The crash prover sees all ways to write, and what a handler does to the transaction."""

from contextlib import suppress

import pytest
from django.db import IntegrityError, connection, transaction
from django.db.models import Manager, QuerySet
from psycopg.errors import UniqueViolation

from spark_outbox import Event, handler
from spark_outbox.errors import BrokenTransaction
from tests.challenges.models import Donation, Handled
from tests.probe.models import Badge, Named
from tests.tools import handled, make_challenge, note

COPY = "copy challenges_handled (key, handler, note) from stdin"
EVENT = Event("g", "key")


def copy_in(event):
    with connection.cursor() as cursor, cursor.copy(COPY) as copy:
        copy.write_row((event.key, "copy", ""))
        copy.write_row((event.key, "copy", ""))


def positions():
    with connection.cursor() as cursor:
        cursor.execute("select sequencename, last_value from pg_sequences order by 1")
        return cursor.fetchall()


@pytest.mark.parametrize("atomic", [True, False])
def test_a_copy_is_cut_off_before_and_after_it(outbox, own_registry, atomic):
    note(Event("g", "before"))

    @handler("^g$", atomic=atomic)
    def write(event):
        copy_in(event)
        with connection.cursor() as cursor, cursor.copy("copy challenges_handled to stdout") as copy:
            assert len(list(copy.rows())) > 2

    if atomic:
        boundaries = outbox.crash_everywhere(write, EVENT)
        assert [each.split()[:2] for each in boundaries[:2]] == [["before", "copy"], ["after", "copy"]]
    else:
        with pytest.raises(AssertionError, match=r"at 4 of 5 boundaries(.|\n)*2\. after copy"):
            outbox.crash_everywhere(write, EVENT)
    assert handled() == ["before"]


def test_a_call_after_a_copy_can_be_lost(outbox, own_registry):
    calls = []

    @handler("^g$", atomic=False)
    def write(event):
        if not Handled.objects.filter(handler="copy").exists():
            copy_in(event)
            calls.append(event.key)

    with pytest.raises(AssertionError, match=r"4\. after copy.*\n    one call less: 'key'"):
        outbox.crash_everywhere(write, EVENT, calls=[calls])


def test_an_error_costs_its_statement_alone_whatever_sends_it(outbox, own_registry):
    make_challenge(pk=7)

    @handler("^g$", atomic=False)
    def write(event):
        with pytest.raises(UniqueViolation):
            connection.connection.execute(
                "insert into challenges_challenge (id, title, is_active, start_date, end_date) "
                "select id, title, is_active, start_date, end_date from challenges_challenge"
            )
        Handled.objects.get_or_create(key=event.key, handler="late")

    assert outbox.crash_everywhere(write, EVENT)


@pytest.fixture(params=["of a schema", "partitioned"])
def other_table(request, db, monkeypatch):
    """Keep `Handled` in a table of another kind."""
    columns = "(like challenges_handled including defaults including identity)"
    if request.param == "partitioned":
        run("alter table challenges_handled rename to former")
        run(
            f"create table challenges_handled {columns.replace('challenges_handled', 'former')} "
            "partition by list (handler)"
        )
        run("create table noted partition of challenges_handled for values in ('note')")
        return
    run(f"create schema other; create table other.handled {columns}")
    monkeypatch.setattr(Handled._meta, "db_table", 'other"."handled')
    for field in Handled._meta.concrete_fields:
        assert field.cached_col
        monkeypatch.delitem(vars(field), "cached_col")


def run(sql):
    with connection.cursor() as cursor:
        cursor.execute(sql)


def test_rows_of_other_schemas_and_of_partitions_are_compared(outbox, own_registry, other_table):
    before = positions()
    own_registry.add_handler(note, group="^g$", atomic=False)
    with pytest.raises(AssertionError, match=r"2\. after INSERT.*\n    one row more: challenges.H"):
        outbox.crash_everywhere(note, EVENT)
    assert positions() == before


def test_rows_that_a_manager_hides_are_compared(outbox, own_registry, monkeypatch):
    monkeypatch.setattr(Manager, "get_queryset", lambda manager: QuerySet(manager.model).none())
    own_registry.add_handler(note, group="^g$", atomic=False)
    with pytest.raises(AssertionError, match=r"one row more: challenges\.H"):
        outbox.crash_everywhere(note, EVENT)


def test_references_to_new_rows_are_compared_if_their_keys_are_names(outbox, own_registry):
    @handler("^g$", atomic=False)
    def write(event):
        for name in ("one", "two"):
            Named.objects.get_or_create(name=name)
        Badge.objects.get_or_create(pk=1, defaults={"holder_id": ["one", "two"][event.attempt - 1]})

    with pytest.raises(AssertionError, match=r"one row more: probe\.Badge: a new row, holder_id='two'"):
        outbox.crash_everywhere(write, EVENT)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("atomic", [True, False])
def test_nothing_is_left_behind_when_the_handler_raises(outbox, own_registry, atomic, error):
    calls = []

    @handler("^g$", atomic=atomic)
    def write(event):
        calls.append(event.key)
        with transaction.atomic():
            note(event)
            raise error

    before = positions()
    with pytest.raises(error):
        outbox.crash_everywhere(write, EVENT, calls=[calls])
    assert (calls, handled(), positions()) == ([], [], before)


# What a worker would not commit


@pytest.mark.parametrize("sql", [True, False])
@pytest.mark.parametrize("atomic", [True, False])
def test_no_handler_ends_the_tests_transaction(outbox, own_registry, atomic, sql):
    note(Event("g", "before"))

    @handler("^g$", atomic=atomic)
    def end(event):
        note(event)
        connection.connection.execute("commit") if sql else connection.connection.rollback()

    with pytest.raises(BrokenTransaction, match="in another way than by atomic"):
        outbox.crash_everywhere(end, EVENT)
    if atomic:
        with pytest.raises(BrokenTransaction, match="must not commit or roll back"):
            outbox.handle(end)
    assert handled() == ["before"]


def test_a_handler_must_not_go_on_after_an_error_of_the_database(outbox, own_registry):
    make_challenge(pk=7)

    @handler("^g$")
    def go_on(event):
        note(event)
        with suppress(IntegrityError):
            make_challenge(pk=7)

    for call in (outbox.handle, lambda handler: outbox.crash_everywhere(handler, EVENT)):
        with pytest.raises(BrokenTransaction, match="went on after a database error"):
            call(go_on)
    assert handled() == []


@pytest.mark.parametrize("atomic", [True, False])
def test_deferred_constraints_are_checked_where_a_worker_commits(outbox, own_registry, atomic):
    challenge = make_challenge("there")

    @handler("^g$", atomic=atomic)
    def write(event):
        with transaction.atomic():
            donation = Donation.objects.create(challenge_id=0, amount=1)
            if event.get("mend"):
                Donation.objects.filter(pk=donation.pk).update(challenge=challenge)
                Donation.objects.filter(challenge=challenge).exclude(pk=donation.pk).delete()

    with pytest.raises(IntegrityError, match="is not present in table"):
        outbox.crash_everywhere(write, EVENT)
    assert outbox.crash_everywhere(write, Event("g", "key", mend=True))
    if atomic:
        with pytest.raises(IntegrityError):
            outbox.handle(write)
    Donation.objects.create(challenge_id=0, amount=1).delete()  # they are still deferred
