"""The fixture `outbox`, and strict mode, for pytest.

pytest imports this module when it starts: before pytest-django knows the settings, before pytest-cov
measures, and in projects without Django. So it imports nothing but pytest until a test asks for more.
"""

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from spark_outbox.testing import Outbox
    from spark_outbox.testing.strictness import Watch

INI = "spark_outbox_strict"


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "A test fails if it emits an event that no handler matches."
    parser.addini(INI, text, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "outbox(strict=…, using='default'): whether the test fails if it emits an event that no handler "
        "matches; and the database of the fixture `outbox`.",
    )


@pytest.fixture
def outbox(request: pytest.FixtureRequest, db: None) -> Iterator["Outbox"]:  # noqa: ARG001
    """See what the test has emitted, and handle it: a `spark_outbox.testing.Outbox`."""
    from spark_outbox.testing import Outbox

    with Outbox(using=_option(request.node, "using", "default")) as outbox:
        yield outbox


# Strict mode: the watch begins before the fixtures, which may emit as well, and judges right after the
# test, while the handlers are registered that the test has registered.

WATCH: "pytest.StashKey[Watch]" = pytest.StashKey()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    if _is_strict(item):
        from spark_outbox.testing.strictness import Watch

        item.stash[WATCH] = Watch()
        item.stash[WATCH].start()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    if WATCH not in item.stash:
        return (yield)
    with item.stash[WATCH].judging():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        if WATCH in item.stash:
            item.stash[WATCH].stop()


def _is_strict(item: pytest.Item) -> bool:
    return bool(_option(item, "strict", item.config.getini(INI)))


def _option(item: pytest.Item, name: str, default: Any) -> Any:
    """Return an option of the closest marker that has it."""
    markers = item.iter_markers("outbox")
    return next((each.kwargs[name] for each in markers if name in each.kwargs), default)
