"""A project that has another database than PostgreSQL besides: the outbox passes it over."""

import sqlite3

import pytest
from django.db import connections

from spark_outbox import emit, emit_many
from spark_outbox.errors import NotMigrated
from tests.tools import manage

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def lite(tmp_path):
    """Run manage.py in a project that has the database `lite`; and say what is in that."""

    class Lite:
        def manage(self, *arguments):
            done = manage(
                *arguments, DJANGO_SETTINGS_MODULE="tests.two_vendors", LITE=f"{tmp_path}/lite"
            )
            return done.returncode, done.stdout, done.stderr

        def ours(self):
            database = sqlite3.connect(tmp_path / "lite")
            names = [name for (name,) in database.execute("select name from sqlite_master")]
            database.close()
            assert "auth_user" in names
            return [name for name in names if "spark" in name]

    return Lite()


def test_migrate_passes_over_a_database_that_is_not_postgresql(lite):
    code, _, err = lite.manage("migrate", "--database", "lite")
    assert (code, err) == (0, "")
    assert lite.ours() == []
    code, out, err = lite.manage("migrate", "--database", "lite", "spark_outbox", "zero")
    assert (code, err) == (0, "")
    assert "Unapplying spark_outbox.0001_initial... OK" in out
    code, _, err = lite.manage("migrate", "--database", "lite")
    assert (code, err) == (0, "")
    assert lite.ours() == []


def test_check_finds_nothing_wrong_with_such_a_database(lite):
    assert lite.manage("migrate", "--database", "lite")[0] == 0
    code, out, _ = lite.manage("check", "--database", "lite", "--database", "default")
    assert code == 0
    assert "no issues" in out


def test_such_a_project_has_no_changes_to_migrate(lite):
    code, out, _ = lite.manage("makemigrations", "--check", "--dry-run")
    assert code == 0
    assert "No changes" in out


def test_nothing_is_emitted_into_such_a_database(monkeypatch):
    monkeypatch.setattr(type(connections["default"]), "vendor", "sqlite")
    for attempt in (lambda: emit("g", "key"), lambda: emit_many([{"group": "g"}])):
        with pytest.raises(NotMigrated, match=r"Database 'default' is sqlite.* needs PostgreSQL"):
            attempt()
