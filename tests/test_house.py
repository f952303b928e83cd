"""What holds the house together: public names, settings, checks, migrations, the view."""

import io
import json
from dataclasses import fields
from datetime import timedelta

import pytest
from django.core.management import call_command
from django.db import connection, connections

import spark_outbox
from spark_outbox import api, checks, conf, emit, errors, testing
from spark_outbox.errors import SettingsError
from spark_outbox.models import OutboxEvent
from spark_outbox.store import waking
from tests.postgres import ROOT
from tests.tools import manage


def test_the_public_names_are_these():
    assert spark_outbox.__all__ == [
        "BatchFailed",
        "Discard",
        "Event",
        "Retry",
        "aemit",
        "aemit_many",
        "emit",
        "emit_many",
        "handler",
        "source",
    ]
    assert api.__all__ == [
        "HANDLERS",
        "MODEL_SOURCES",
        "Event",
        "event",
        "only_new_events",
        "process_events",
        "register_group_handler",
        "register_model_event_source",
    ]
    for module in (spark_outbox, api):
        assert all(hasattr(module, name) for name in module.__all__)
    assert {n for n in vars(testing) if n in {"drain", "emitted", "capture_events"}} == {
        "drain",
        "emitted",
        "capture_events",
    }


def test_every_exception_is_in_the_tree_that_its_module_draws():
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and c.__module__ == errors.__name__
    ]
    assert len(classes) > 8
    for exception in classes:
        assert issubclass(exception, errors.SparkOutboxError | errors.HandlerTimeout)
        assert exception.__name__ in errors.__doc__


# Who does what


@pytest.mark.parametrize(
    ("words", "places"),
    [
        ("django.conf import", ("conf.py",)),
        ("signal.signal(", ("management/", "processes/", "bench/")),
        ("os.fork(", ("processes/", "bench/")),
        ("post_save.connect(", ("apps.py",)),
    ],
)
def test_some_things_are_done_in_few_places(words, places):
    package = ROOT / "spark_outbox"
    found = [path.relative_to(package) for path in package.rglob("*.py") if words in path.read_text()]
    assert found
    assert [path for path in found if not str(path).startswith(places)] == []


@pytest.mark.parametrize(("folder", "most"), [("", 300), ("management/commands", 150)])
def test_no_module_is_long(folder, most):
    for path in (ROOT / "spark_outbox" / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= most, path
    assert len((ROOT / "spark_outbox/worker/loop.py").read_text().splitlines()) < 180


# Settings


def test_the_defaults(settings):
    settings.SPARK_OUTBOX = {}
    assert conf.current() == conf.Settings()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"BATCHSIZE": 1}, "Did you mean 'BATCH_SIZE'"),
        ({"wake": "never"}, "Did you mean 'WAKE'"),
        ({"XYZZY": 1}, "Known names: WAKE"),
        ({"WAKE": "sometimes"}, "'gated' or 'always' or 'never'"),
        ({"DISPATCH": "celery"}, "'worker' or 'on_commit'"),
        ({"BATCH_SIZE": 0}, "1 or more"),
        ({"BATCH_SIZE": "500"}, "1 or more"),
        ({"POLL_INTERVAL": 0}, "above 0"),
        ({"MAX_ATTEMPTS": 0}, "1 or more"),
        ({"BREAK_AFTER": 0}, "1 or more"),
        ({"FAILED_HEAD": "stop"}, "'block' or 'skip'"),
        ({"TIMEOUT": 0}, "above 0"),
        ({"BACKOFF": -1}, "above 0"),
        ({"COMMIT_INTERVAL": True}, "above 0"),
        ({"REQUIRE_ATOMIC": 1}, "True or False"),
        ({"LISTEN_DATABASE": 5}, "alias or None"),
        ({"ENVIRONMENT": None}, "a text"),
        ({"REDACT": "token"}, "a list of names, or the dotted path of a function"),
        (["WAKE"], "must be a dict"),
    ],
)
def test_a_bad_setting_is_refused_with_the_cure(settings, given, message):
    settings.SPARK_OUTBOX = given
    with pytest.raises(SettingsError, match=message):
        conf.current()
    (error,) = checks.check_settings()
    assert error.id == "spark_outbox.E001"


def test_durations_are_seconds_or_timedeltas(settings):
    settings.SPARK_OUTBOX = {"POLL_INTERVAL": timedelta(minutes=2), "COMMIT_INTERVAL": 1}
    assert (conf.current().POLL_INTERVAL, conf.current().COMMIT_INTERVAL) == (120.0, 1.0)


def test_a_listen_database_that_does_not_exist_is_found_by_check(settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": "direct"}
    (error,) = checks.check_settings()
    assert error.id == "spark_outbox.E002"


def test_a_database_that_is_not_postgresql_is_found_by_check(monkeypatch):
    assert checks.check_vendor() == []
    monkeypatch.setattr(type(connections["default"]), "vendor", "sqlite")
    (error,) = checks.check_vendor()
    assert error.id == "spark_outbox.E003"
    assert "needs PostgreSQL" in error.hint


@pytest.mark.django_db
def test_check_warns_if_the_trigger_does_not_do_what_the_settings_say(settings):
    assert checks.check_databases(databases=["default"]) == []
    settings.SPARK_OUTBOX = {"WAKE": "always"}
    (warning,) = checks.check_databases(databases=["default"])
    assert warning.id == "spark_outbox.W001"
    assert "is in mode 'gated'" in warning.msg


# Migrations


@pytest.mark.django_db
def test_models_and_migrations_agree():
    out = io.StringIO()
    call_command("makemigrations", check=True, dry_run=True, stdout=out)
    assert "No changes" in out.getvalue()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("mode", ["always", "never", "gated"])
@pytest.mark.usefixtures("wake_mode")  # which puts it back
def test_migrate_makes_the_trigger_do_what_the_settings_say(settings, mode):
    settings.SPARK_OUTBOX = {"WAKE": mode}
    call_command("migrate", verbosity=0)
    assert waking.wake_mode(using="default") == mode


@pytest.mark.django_db(transaction=True)
def test_the_triggers_of_the_setting_are_those_of_the_migration(wake_mode):
    def triggers():
        with connection.cursor() as cursor:
            cursor.execute(
                "select pg_get_triggerdef(oid) from pg_trigger "
                "where tgrelid = 'spark_outbox_event'::regclass and tgname like 'spark_outbox_wake%' "
                "order by tgname"
            )
            return cursor.fetchall()

    migrated = triggers()
    assert len(migrated) == 2
    wake_mode("never")
    assert not triggers()
    wake_mode("gated")
    assert triggers() == migrated
    with connection.cursor() as cursor:
        cursor.execute("drop trigger spark_outbox_wake_again on spark_outbox_event")
    assert waking.wake_mode(using="default") == "never"  # so that `migrate` brings it back


REPAIRS = ["search_path=pg_catalog, public, pg_temp", "client_min_messages=notice"]


@pytest.mark.django_db
def test_functions_pin_their_search_path():
    with connection.cursor() as cursor:
        cursor.execute("select proname, proconfig from pg_proc where proname like 'spark%%'")
        found = dict(cursor.fetchall())
        cursor.execute("create schema elsewhere")
        cursor.execute("set local search_path = elsewhere, public")
        cursor.execute("create table elsewhere.spark_outbox_event (like public.spark_outbox_event)")
        cursor.execute("select public.spark_emit('g', 'k')")
        cursor.execute("select count(*) from public.spark_outbox_event")
        assert cursor.fetchone() == (1,)
    assert found == {
        "spark_emit": ["search_path=pg_catalog, public, pg_temp"],
        "spark_outbox_check_home": ["search_path=pg_catalog, public, pg_temp"],
        "spark_outbox_check_keys": ["search_path=pg_catalog, public, pg_temp"],
        "spark_outbox_digest": None,
        "spark_outbox_emit_many": ["search_path=pg_catalog, public, pg_temp"],
        "spark_outbox_forget_keys": ["search_path=pg_catalog, public, pg_temp", "lock_timeout=1s"],
        "spark_outbox_ids_are_behind": ["search_path=pg_catalog, public, pg_temp"],
        "spark_outbox_close_circuit": ["search_path=pg_catalog, public, pg_temp"],
        "spark_outbox_check_kind": REPAIRS,
        "spark_outbox_pause_mark": None,
        "spark_discard": REPAIRS,
        "spark_explain": ["search_path=pg_catalog, public, pg_temp"],
        "spark_pause": REPAIRS,
        "spark_replay": REPAIRS,
        "spark_resume": REPAIRS,
        "spark_retry": REPAIRS,
        "spark_retry_failed": REPAIRS,
        "spark_outbox_explain_pending": ["search_path=pg_catalog, public, pg_temp"],
        "spark_outbox_fingerprint": None,
        "spark_outbox_id_of": REPAIRS,
        "spark_outbox_lock": REPAIRS,
        "spark_outbox_reopen": REPAIRS,
        "spark_outbox_give_up": REPAIRS,
        "spark_outbox_owe_again": REPAIRS,
        "spark_outbox_lock_failed": REPAIRS,
        "spark_outbox_prune": ["search_path=pg_catalog, public, pg_temp", "lock_timeout=1s"],
        "spark_outbox_referenced": ["search_path=pg_catalog, public, pg_temp", "lock_timeout=1s"],
        "spark_outbox_refuse_pruned": ["search_path=pg_catalog, pg_temp"],
        "spark_outbox_is_same": ["search_path=pg_catalog, public, pg_temp"],
        "spark_outbox_wake": ["search_path=pg_catalog, pg_temp"],
    }


@pytest.mark.django_db
def test_the_table_has_the_indexes_that_the_design_names_and_no_more():
    with connection.cursor() as cursor:
        cursor.execute("select indexname from pg_indexes where tablename = 'spark_outbox_event'")
        assert sorted(name for (name,) in cursor.fetchall()) == [
            "spark_outbox_event_aside",
            "spark_outbox_event_discarded",
            "spark_outbox_event_done",
            "spark_outbox_event_due",
            "spark_outbox_event_key",
            "spark_outbox_event_order",
            "spark_outbox_event_ordered",
            "spark_outbox_event_ordered_due",
            "spark_outbox_event_pkey",
            "spark_outbox_event_ready",
        ]


@pytest.mark.django_db
def test_deleting_events_by_sql_deletes_their_deliveries():
    event = emit("g", "key")
    OutboxEvent.objects.get().deliveries.create(handler="h")
    with connection.cursor() as cursor:
        cursor.execute("delete from spark_outbox_event where id = %s", [event.id])
        cursor.execute("select count(*) from spark_outbox_delivery")
        assert cursor.fetchone() == (0,)


# The demo


@pytest.mark.django_db(transaction=True)
def test_the_demo_balances_its_books():
    done = manage("spark_demo", "--seconds", "2", "--rate", "100", "--json")
    assert done.returncode == 0, done.stderr
    books = json.loads(done.stdout)
    assert list(books) == [
        "committed",
        "rolled_back",
        "duplicates",
        "handled",
        "lost",
        "handled_twice",
        "latency_ms",
        "postgres",
    ]
    assert books["committed"] == books["handled"] > 20
    assert (books["lost"], books["handled_twice"]) == (0, 0)
    assert books["rolled_back"] > 0
    assert books["duplicates"] > 0
    assert 0 < books["latency_ms"]["p50"] <= books["latency_ms"]["p99"]


@pytest.mark.django_db(transaction=True)
def test_the_demo_exits_non_zero_if_the_books_do_not_balance():
    with connection.cursor() as cursor:
        cursor.execute(
            "create function sabotage() returns trigger language plpgsql as $$ begin "
            "insert into challenges_handled (key, handler, note) values (new.key, 'saboteur', ''); "
            "return null; end $$"
        )
        cursor.execute(
            "create trigger sabotage after insert on challenges_handled for each row "
            "when (new.handler <> 'saboteur') execute function sabotage()"
        )
    try:
        done = manage("spark_demo", "--seconds", "1", "--json")
    finally:
        with connection.cursor() as cursor:
            cursor.execute("drop function sabotage cascade")
    assert done.returncode == 1
    assert json.loads(done.stdout)["handled_twice"] > 0
    assert "handled more than once" in done.stderr


@pytest.mark.django_db
def test_settings_are_all_documented_where_they_are_defined():
    import inspect

    source = inspect.getsource(conf.Settings)
    for field in fields(conf.Settings):
        assert f"    {field.name}: " in source
