"""Registering handlers and sources: names, patterns, what is refused."""

import functools

import pytest

from spark_outbox import handler, source
from spark_outbox.errors import RegistrationError
from spark_outbox.registry import Registry
from tests.challenges.models import Challenge


def some_handler(event):
    """Do nothing."""


def another_handler(event):
    """Do nothing, either."""


def generator(event):
    yield event


@pytest.fixture
def registry():
    return Registry()


def test_a_handlers_name_is_its_dotted_path_or_what_it_is_given(registry):
    assert registry.add_handler(some_handler, group="a").name == "tests.test_registry.some_handler"
    assert registry.add_handler(another_handler, group="a", name="mail").name == "mail"


def test_a_function_may_handle_several_patterns(registry):
    names = [registry.add_handler(some_handler, group=group).name for group in ("^a", "^b")]
    assert names == ["tests.test_registry.some_handler", "tests.test_registry.some_handler:^b"]
    assert len(registry.handlers_for("a")) == 1


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda r: r.add_handler(some_handler, group="("), "does not compile"),
        (lambda r: r.add_handler(some_handler, group=None), "does not compile"),
        (lambda r: r.add_handler("some_handler", group="a"), "must be callable"),
        (lambda r: r.add_handler(functools.partial(some_handler), group="a"), "name=…"),
        (lambda r: r.add_handler(some_handler, group="a", name=""), "1 to 255 characters"),
        (lambda r: r.add_handler(generator, group="a"), "a generator"),
        (lambda r: r.add_source(some_handler, model="app.Model"), "model class"),
        (lambda r: r.add_source(None, model=Challenge), "must be callable"),
        (
            lambda r: [r.add_source(some_handler, model=Challenge) for _ in "12"],
            "a source of .* already",
        ),
        (
            lambda r: [r.add_handler(f, group="a", name="n") for f in (some_handler, print)],
            "another with name=",
        ),
        (lambda r: [r.add_handler(some_handler, group="^a") for _ in "123"], "another with name="),
    ],
)
def test_what_cannot_be_registered_is_refused_with_the_cure(registry, register, message):
    with pytest.raises(RegistrationError, match=message):
        register(registry)


def test_two_lambdas_need_names(registry):
    registry.add_handler(lambda event: None, group="a")
    with pytest.raises(RegistrationError, match="name="):
        registry.add_handler(lambda event: None, group="a")


def test_a_handler_that_forgets_its_pattern_is_told():
    with pytest.raises(RegistrationError, match=r'@handler\(r"\^pattern"\)'):
        handler(some_handler)


def test_decorators_return_the_function_as_it_was(own_registry):
    assert handler("^a")(some_handler) is some_handler
    assert source(Challenge)(another_handler) is another_handler
    assert own_registry.sources == {Challenge: [another_handler]}


def test_matches_are_cached_but_not_without_bound(registry):
    added = registry.add_handler(some_handler, group="^a")
    assert registry.handlers_for("abc") == (added,)
    for number in range(3000):
        registry.handlers_for(f"group {number}")
    assert len(registry._matches) <= 1024
    late = registry.add_handler(another_handler, group="c$")
    assert registry.handlers_for("abc") == (added, late)


def test_handlers_py_and_sources_py_of_installed_apps_are_discovered():
    from spark_outbox.registry import registry as of_the_project

    names = [registered.name for registered in of_the_project.handlers]
    assert "tests.challenges.handlers.thank_for_donation" in names
    assert [f.__name__ for f in of_the_project.sources[Challenge]] == ["events_from_challenge"]
