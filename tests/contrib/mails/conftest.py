"""Shared by the tests of mails: a server that takes them, and Django's settings for it."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import django
import pytest

from spark_outbox.contrib.mails import handlers
from spark_outbox.contrib.mails.models import Mail
from spark_outbox.registry.handlers import Registry
from tests.contrib.mails import server
from tests.contrib.mails.server import Post
from tests.dashboard.conftest import admin, member

__all__ = ["admin", "member"]

SMTP = "django.core.mail.backends.smtp.EmailBackend"


@pytest.fixture
def post(settings: Any) -> Iterator[Post]:
    """A server, to which Django sends mails."""
    with server.running() as running:
        if django.VERSION >= (6, 1):
            options = {"host": "127.0.0.1", "port": running.port, "timeout": 30}
            settings.MAILERS = {"default": {"BACKEND": SMTP, "OPTIONS": options}}
        else:
            settings.EMAIL_BACKEND = SMTP
            settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", running.port
            settings.EMAIL_TIMEOUT = 30
        settings.DEFAULT_FROM_EMAIL = "Shop <shop@shop.example>"
        yield running


@pytest.fixture
def sender(own_registry: Registry) -> None:
    """The handler that sends is registered in the registry of the test."""
    importlib.reload(handlers)


@pytest.fixture
def recorded(settings: Any) -> None:
    """Mails go to `django.core.mail.outbox`."""
    backend = "django.core.mail.backends.locmem.EmailBackend"
    if django.VERSION >= (6, 1):
        settings.MAILERS = {"default": {"BACKEND": backend}}


@pytest.fixture
def mail(db: None) -> Callable[..., Mail]:
    """A function that writes a mail, as the admin does."""

    def write(event_group: str = "paid", **parts: Any) -> Mail:
        made = Mail(event_group=event_group, **{"subject": "Thanks", "body": "Thank you.", **parts})
        made.full_clean()
        made.save()
        return made

    return write
