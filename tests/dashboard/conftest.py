"""Shared by the tests of the dashboard: failures, people, and an outbox of two million events."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client

from tests.store.conftest import logins

__all__ = ["admin", "fail", "logins", "many_events", "member"]

FAILED = """
with event as (
    insert into spark_outbox_event (key, event_group, status, attempts, created_at, finished_at)
    select
        %(name)s || ' ' || n, 'order', 'failed', 1, now() - %(age)s * interval '1 second',
        now() - %(age)s * interval '1 second'
    from generate_series(1, %(number)s) as n
    returning id, key
)
insert into spark_outbox_delivery (event_id, handler, status, attempts, attempted_at, error, traceback)
select id, %(handler)s, 'failed', 1, now() - %(age)s * interval '1 second', %(error)s, %(traceback)s
from event
"""


@pytest.fixture
def fail() -> Callable[..., None]:
    """A function that writes events that have failed for good."""

    def write(name: str = "key", **params: Any) -> None:
        usual: dict[str, Any] = {"handler": "shop.mail", "error": "ValueError: no", "traceback": ""}
        usual |= {"number": 1, "age": 0}
        assert set(params) <= set(usual)
        with connection.cursor() as cursor:
            cursor.execute(FAILED, {"name": name, **usual, **params})

    return write


@pytest.fixture
def member(db: None) -> Callable[..., User]:
    """A function that makes a user of the staff, with permissions."""

    def make(*permissions: str, name: str = "anna") -> User:
        user = User.objects.create_user(name, password=name, is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
        return user

    return make


@pytest.fixture
def admin(db: None, client: Client) -> Client:
    """A client of somebody who may do everything."""
    client.force_login(User.objects.create_superuser("boss", password="boss"))
    return client


MANY = """
insert into spark_outbox_event (key, event_group, status, created_at, finished_at)
select 'many ' || n, 'group ' || n %% 5, 'done', at, at from (
    select n, now() - (%(count)s - n) * interval '0.1 second' as at
    from generate_series(1, %(count)s) as n
) as made
"""

FAILURES = """
insert into spark_outbox_event (key, event_group, status, attempts, finished_at)
select 'failure ' || n, 'broken', 'failed', 1, at from (
    select n, now() - (40000 - n) * interval '1 second' as at from generate_series(1, 40000) as n
) as made;
insert into spark_outbox_delivery (event_id, handler, status, attempts, attempted_at, error, duration)
select id, 'handler ' || id % 2, 'failed', 1, finished_at,
    'Error: ' || translate((id % 3)::text, '012', 'xyz'), '5 milliseconds'
from spark_outbox_event where status = 'failed';
"""


@pytest.fixture(scope="module")
def many_events(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """Two million events that are done, ten a second in five groups; and 40,000 that failed."""
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        cursor.execute("truncate spark_outbox_event restart identity cascade")
        cursor.execute(MANY, {"count": 2_000_000})
        cursor.execute(FAILURES)
        cursor.execute("vacuum analyze spark_outbox_event")
        cursor.execute("vacuum analyze spark_outbox_delivery")
        yield
        cursor.execute("truncate spark_outbox_event restart identity cascade")
