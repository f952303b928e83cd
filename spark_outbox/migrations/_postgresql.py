"""Operations that run the SQL files of sql/, on PostgreSQL alone.

A project may have other databases. The outbox is not created there: Django skips its tables, because
their models have `required_db_vendor`, and RunSQL skips the rest.
"""

from pathlib import Path
from typing import Any

from django.db import migrations
from django.db.backends.base.schema import BaseDatabaseSchemaEditor

SQL = Path(__file__).with_name("sql")


class RunSQL(migrations.RunSQL):
    """Django's RunSQL, but it skips databases of other vendors."""

    path: Path | None = None
    """The file, if the SQL is that of one."""

    def database_forwards(
        self, app_label: str, schema_editor: BaseDatabaseSchemaEditor, *states: Any
    ) -> None:
        if schema_editor.connection.vendor == "postgresql":
            super().database_forwards(app_label, schema_editor, *states)

    def database_backwards(
        self, app_label: str, schema_editor: BaseDatabaseSchemaEditor, *states: Any
    ) -> None:
        if schema_editor.connection.vendor == "postgresql":
            super().database_backwards(app_label, schema_editor, *states)


def run_file(name: str) -> RunSQL:
    """Return the operation that runs sql/`name`.sql, and sql/`name`_reverse.sql backwards.

    The files are frozen once released, as migrations are: a database may have run them.
    """
    path, reverse = SQL / f"{name}.sql", SQL / f"{name}_reverse.sql"
    operation = RunSQL(path.read_text("utf-8"), reverse.read_text("utf-8"))
    operation.path = path
    return operation
