"""What `spark_demo --serve` needs beside a worker: the admin, a login, events of which a few fail."""

import random
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from django.contrib.auth import get_user_model
from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.servers.basehttp import (
    ThreadedWSGIServer,
    WSGIRequestHandler,
    get_internal_wsgi_application,
)
from django.db import connection, transaction

from spark_outbox import emit

HOST = "127.0.0.1"

USER = "demo"

KEPT = 100
"""How many challenges the stream remembers: it goes on for ever."""


class Request(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: a page that is live asks every few seconds."""


@contextmanager
def admin(port: int | None) -> Iterator[str]:
    """Serve the project to this machine alone, until the end of the block; yield the dashboard's URL."""
    server = _server(port)
    server.set_app(StaticFilesHandler(get_internal_wsgi_application()))
    thread = threading.Thread(target=server.serve_forever, name="admin", daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/admin/spark_outbox/dashboard/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _server(port: int | None) -> ThreadedWSGIServer:
    """Listen on this port; without one on 8000, or on any other if that is taken."""
    if port is None:
        try:
            return ThreadedWSGIServer((HOST, 8000), Request)
        except OSError:
            port = 0
    return ThreadedWSGIServer((HOST, port), Request)


@contextmanager
def login() -> Iterator[tuple[str, str]]:
    """Make somebody who may do everything, until the end of the block; yield name and password."""
    password = secrets.token_hex(4)
    user, _ = get_user_model().objects.get_or_create(username=USER)
    user.is_active = user.is_staff = user.is_superuser = True
    user.set_password(password)
    user.save()
    try:
        yield USER, password
    finally:
        connection.close()  # Ctrl-C may have come in the middle of a query
        user.set_unusable_password()
        user.save()


def at_rate(rate: float) -> Iterator[None]:
    """Yield about as often a second as `rate` says, a little more and less by turns."""
    while True:
        yield
        time.sleep(random.uniform(0.2, 1.8) / rate)


@transaction.atomic
def emit_something() -> None:
    """Emit an event of the handlers that need a person now and then; see handlers.py."""
    number = random.randrange(10**6)
    kind = random.random()
    if kind < 0.5:
        host = "example.invalid" if random.random() < 0.1 else "example.com"
        emit("receipt_wanted", f"receipt_{number}", email=f"member-{number}@{host}")
    elif kind < 0.7:
        emit("partner_wants_news", f"news_{number}", is_busy=random.random() < 0.3)
    elif kind < 0.74:
        emit("poster_wanted", f"poster_{number}", seconds=random.uniform(0.1, 0.8))
    elif kind < 0.85:
        delay = timedelta(seconds=random.randrange(20, 90))
        emit("reminder_due", f"reminder_{number}", delay=delay)
