"""SQL in the session of the thread that runs it: of a test, or of the handler that it calls."""

from typing import Any

from django.db import connection

ROW = "insert into challenges_handled (key, handler, note) values ('raw', 'raw', '')"


def run(text: Any, params: Any = None) -> list[Any]:
    """Run SQL through Django; return its rows, if it has any."""
    with connection.cursor() as cursor:
        cursor.execute(text, params)
        return cursor.fetchall() if cursor.description else []


def show(name: str) -> Any:
    """Return what a setting is, or None if there is none of that name."""
    return run("select current_setting(%s, true)", [name])[0][0]
