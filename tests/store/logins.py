"""Users of the database, one in each role of deploy/roles.sql, for tests that connect as each."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import Any

import psycopg
from django.db import connection
from psycopg.conninfo import make_conninfo

from tests.postgres import ROOT
from tests.tools import conninfo

ROLES = ("emitter", "worker", "viewer", "operator")
ROLES_SQL = (ROOT / "deploy" / "roles.sql").read_text()

# What a project grants besides: its own tables.
PROJECT = """
grant select, insert, update, delete
    on challenges_challenge, challenges_donation, challenges_handled, auth_group to {0};
grant select on spark_outbox_generator, spark_outbox_condition to {0};
grant select
    on auth_permission, auth_user_groups, auth_user_user_permissions, django_content_type to {0};
grant select, insert, update on auth_user, django_session, django_admin_log to {0};
"""


class Logins:
    """Roles that can log in, one in each role of deploy/roles.sql, and `nobody`, who is in none."""

    def __init__(self, admin: psycopg.Connection[Any]) -> None:
        self.password = secrets.token_hex()
        self.names = {kind: f"spark_test_{kind}_{os.getpid()}" for kind in (*ROLES, "nobody")}
        for kind, name in self.names.items():
            admin.execute(f"create role {name} login password '{self.password}'")
            admin.execute(f"grant {name} to current_user")
            if kind in ROLES:
                admin.execute(f"grant spark_outbox_{kind} to {name}")
                admin.execute(PROJECT.format(name))

    def url(self, kind: str, **options: Any) -> str:
        return make_conninfo(conninfo(), user=self.names[kind], password=self.password, **options)

    def connect(self, kind: str, **options: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url(kind, **options), autocommit=True)

    @contextlib.contextmanager
    def django(self, kind: str) -> Iterator[None]:
        """Have Django's connection connect as that role."""
        before = connection.settings_dict
        connection.close()
        login = {"USER": self.names[kind], "PASSWORD": self.password}
        connection.settings_dict = {**before, **login}
        try:
            with connection.cursor() as cursor:
                cursor.execute("select current_user")
                assert cursor.fetchone() == (self.names[kind],)
            yield
        finally:
            connection.close()
            connection.settings_dict = before
