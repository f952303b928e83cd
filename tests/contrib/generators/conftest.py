from collections.abc import Callable, Iterator
from typing import Any

import pytest

from spark_outbox.contrib.generators import register_source
from spark_outbox.contrib.generators.definitions import SOURCES
from spark_outbox.contrib.generators.models import Generator
from tests.challenges.models import Challenge
from tests.dashboard.conftest import admin, member
from tests.store.conftest import logins

__all__ = ["admin", "logins", "member"]


def _of(challenge: Challenge) -> dict[str, Any]:
    return {"challenge": challenge, "length": len(challenge.title), "title": challenge.title}


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that registers a source. No other is there, and none is left."""
    for name in list(SOURCES):
        monkeypatch.delitem(SOURCES, name)

    def make(name: str = "challenges", **options: Any) -> None:
        usual: dict[str, Any] = {
            "candidates": lambda: Challenge.objects.order_by("pk"),
            "context": _of,
            "variables": {"length": int, "title": str},
        }
        register_source(name, **{**usual, **options})

    yield make
    SOURCES.clear()


@pytest.fixture
def generate(db: None) -> Callable[..., Generator]:
    """A function that makes a generator with conditions."""

    def make(
        group: str = "long",
        *conditions: tuple[str, str, str],
        source: str = "challenges",
        is_active: bool = True,
    ) -> Generator:
        made = Generator.objects.create(group=group, source=source, is_active=is_active)
        for variable, operator, value in conditions:
            made.conditions.create(variable=variable, operator=operator, value=value)
        return made

    return make
