"""Rows written past emit(), as by somebody who has psql and knows no better."""

from typing import Any

from psycopg import sql

from tests.tools import connect


def insert(table: str = "spark_outbox_event", /, **columns: Any) -> int:
    """Insert a row, by default an event; return its id."""
    columns = {"key": "bad", "event_group": "g", **columns} if table.endswith("event") else columns
    statement = sql.SQL("insert into {} ({}) values ({}) returning id").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join([sql.Placeholder()] * len(columns)),
    )
    with connect() as other:
        ((row_id,),) = other.execute(statement, list(columns.values())).fetchall()
        return int(row_id)


def update(statement: str, *params: Any) -> None:
    with connect() as other:
        other.execute(statement, params)
