"""The users of the database, in each role, for the tests that connect as one."""

import contextlib
from collections.abc import Iterator

import psycopg
import pytest

from tests.store.logins import ROLES, ROLES_SQL, Logins
from tests.tools import connect


@pytest.fixture(scope="module")
def logins(django_db_setup: None) -> Iterator[Logins]:
    """Log-ins for the roles of deploy/roles.sql, which are made if the server lacks them."""
    with connect() as admin:
        may = "select rolsuper or rolcreaterole from pg_roles where rolname = current_user"
        if admin.execute(may).fetchone() != (True,):
            pytest.skip("the tests' role may not create roles")
        groups = [f"spark_outbox_{kind}" for kind in ROLES]
        before = admin.execute("select rolname from pg_roles where rolname = any(%s)", [groups])
        kept = {name for (name,) in before}  # they belong to others on this server
        for _ in range(2):  # it can be run again
            admin.execute(ROLES_SQL)
        logins = Logins(admin)
        try:
            try:
                logins.connect("nobody").close()
            except psycopg.OperationalError:
                pytest.skip("the server lets nobody log in by password")
            yield logins
        finally:
            for name in (*logins.names.values(), *(set(groups) - kept)):
                # In use meanwhile by the tests of somebody else: then it is left to them.
                with contextlib.suppress(psycopg.errors.DependentObjectsStillExist):
                    admin.execute(f"grant {name} to current_user")
                    admin.execute(f"drop owned by {name}")
                    admin.execute(f"drop role {name}")
