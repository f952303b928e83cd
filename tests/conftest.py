import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from spark_outbox.registry.handlers import Registry, registry
from spark_outbox.store import waking
from tests import postgres
from tests.tools import Flags

pytest_plugins = ["spark_outbox.pytest_plugin"]  # as in a project, where pytest finds it by itself


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos")
    group.addoption(
        "--chaos-seconds",
        type=float,
        default=0,
        metavar="N",
        help="inject faults for this long, and each at least once",
    )
    group.addoption(
        "--chaos-seed",
        type=int,
        default=random.randrange(10**6),
        metavar="N",
        help="the seed of every random choice (default: a new one, which is printed)",
    )
    parser.getgroup("projects").addoption(
        "--nightly",
        action="store_true",
        help="drive other people's projects as long as a night allows, and not for a quick look",
    )
    parser.getgroup("dashboard").addoption(
        "--screenshots",
        action="store_true",
        help="renew deploy/screenshots/, which tests/dashboard otherwise leaves alone",
    )


def pytest_report_header() -> str:
    return f"postgresql: {settings.SERVER.description}"


def pytest_unconfigure() -> None:
    postgres.stop_containers()


@contextlib.contextmanager
def empty(of: Registry) -> Iterator[Registry]:
    handlers, sources = list(of.handlers), dict(of.sources)
    of.clear()
    try:
        yield of
    finally:
        of.clear()
        of.handlers.extend(handlers)
        of.sources.update(sources)


@pytest.fixture
def own_registry() -> Iterator[Registry]:
    """Empty the project's registry for one test, which registers its own handlers and sources."""
    with empty(registry) as emptied:
        yield emptied


@pytest.fixture
def flags(tmp_path: Path) -> Flags:
    return Flags(tmp_path)


@pytest.fixture
def unhurried(settings: Any) -> None:
    """Batches end with their last event, however slow the machine is."""
    settings.SPARK_OUTBOX = {**getattr(settings, "SPARK_OUTBOX", {}), "COMMIT_INTERVAL": 600}


@pytest.fixture
def wake_mode(settings: Any) -> Iterator[Callable[[str], None]]:
    """A function that sets WAKE and the trigger's mode. The trigger is reset after the test."""

    def set_mode(mode: str) -> None:
        settings.SPARK_OUTBOX = {"WAKE": mode}
        waking.set_wake_mode(mode, using="default")

    yield set_mode
    waking.set_wake_mode("gated", using="default")
