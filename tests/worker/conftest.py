"""Fixtures that several files of this folder use."""

from collections.abc import Iterator

import pytest
from django.db import connections


@pytest.fixture
def own_session() -> Iterator[None]:
    """What a worker in this thread has set for its session ends with the test."""
    yield
    connections.close_all()
