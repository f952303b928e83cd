"""Registering handlers and sources: names, patterns, what is refused."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar
from unittest.mock import Mock

import pytest
from django.db.models import Model

from spark_outbox import Event, handler, source
from spark_outbox.errors import RegistrationError
from spark_outbox.registry.handlers import Registry
from tests.challenges.models import Challenge


def some_handler(event):
    """Do nothing."""


def another_handler(event):
    """Do nothing, either."""


def generator(event):
    yield event


async def asynchronous(instance):
    """Do nothing."""


async def async_generator(instance):
    yield instance


class Generating:
    def __call__(self, event):
        yield event


@pytest.fixture
def registry():
    return Registry()


def test_a_handlers_name_is_its_dotted_path_or_what_it_is_given(registry):
    assert registry.add_handler(some_handler, group="a").name == f"{__name__}.some_handler"
    assert registry.add_handler(another_handler, group="a", name="mail").name == "mail"


def test_a_function_may_handle_several_patterns(registry):
    names = [registry.add_handler(some_handler, group=group).name for group in ("^a", "^b")]
    assert names == [
        f"{__name__}.some_handler",
        f"{__name__}.some_handler:^b",
    ]
    assert len(registry.handlers_for("a")) == 1


def test_so_may_the_method_of_an_object(registry):
    methods = Methods()
    names = [registry.add_handler(methods.of_self, group=group).name for group in ("^a", "^b")]
    assert names == [
        f"{__name__}.Methods.of_self",
        f"{__name__}.Methods.of_self:^b",
    ]


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda r: r.add_handler(some_handler, group="("), "does not compile"),
        (lambda r: r.add_handler(some_handler, group=None), "does not compile"),
        (lambda r: r.add_handler("some_handler", group="a"), "must be callable"),
        (lambda r: r.add_handler(functools.partial(some_handler), group="a"), "name=…"),
        (lambda r: r.add_handler(some_handler, group="a", name=""), "1 to 255 characters"),
        (lambda r: r.add_handler(generator, group="a"), "a generator"),
        (lambda r: r.add_handler(Generating(), group="a", name="n"), "a generator"),
        (lambda r: r.add_handler(functools.partial(generator), group="a", name="n"), "a generator"),
        (lambda r: r.add_source(some_handler, model=Model), "model class"),
        (lambda r: r.add_source(some_handler, model="app.Model"), "model class"),
        (lambda r: r.add_source(asynchronous, model=Challenge), "is async"),
        (lambda r: r.add_source(functools.partial(async_generator), model=Challenge), "is async"),
        (lambda r: r.add_handler(async_generator, group="a"), "a generator"),
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


def test_a_source_that_forgets_its_model_is_told():
    with pytest.raises(RegistrationError, match=r"@source\(Model\)"):

        @source
        def events_from_something(something):
            yield {}


class Methods:
    def of_self(self, event):
        """Do nothing."""

    @staticmethod
    def static(event):
        """Do nothing."""


@pytest.mark.parametrize(
    "function",
    [
        lambda: None,
        lambda a, b: None,
        lambda *, event: None,
        lambda event, *, mailer: None,
        functools.partial(some_handler, 1),
        Methods.of_self,
        Methods().of_self.__func__,
    ],
)
def test_what_cannot_take_one_argument_is_refused(registry, function):
    with pytest.raises(RegistrationError, match="is called with one argument, the event: "):
        registry.add_handler(function, group="a", name="n")
    with pytest.raises(RegistrationError, match="is called with one argument, the list of events: "):
        registry.add_handler(function, group="a", name="n", batch=5)
    with pytest.raises(RegistrationError, match="is called with one argument, the instance: "):
        registry.add_source(function, model=Challenge)
    assert not registry.handlers
    assert not registry.sources


@pytest.mark.parametrize(
    "function",
    [
        lambda *args: None,
        lambda event, retries=3: None,
        lambda event, **options: None,
        functools.partial(lambda mailer, event: None, 1),
        Methods().of_self,
        Methods.static,
        [].append,  # what is built in may have no signature
        print,
        dict,
        Mock(),
    ],
)
def test_what_can_take_one_argument_is_not(registry, function):
    registry.add_handler(function, group="a", name="n")
    registry.add_handler(function, group="a", name="m", batch=5)
    registry.add_source(function, model=Challenge)


T = TypeVar("T")


class Other(Event):
    """An event of the project's."""


class Box(Generic[T]):
    """Something that is neither."""


def annotated(annotation, returns=None):
    def function(argument):
        """Do nothing."""

    function.__annotations__ = {"argument": annotation, "return": returns}
    return function


LISTS = [
    list,
    list[Event],
    Sequence[Event],
    Iterable[Event],
    list[Any],
    "list[Event]",
    "Sequence[Event]",
    Annotated[list[Event], "some"],
    list[Event] | None,
    list[dict[str, Any]],
]
EVENTS = [
    Event,
    "Event",
    Other,
    Mapping[str, Any],
    Annotated[Event, "some"],
    Event | None,
    "Event | None",
]
EITHER = [
    Any,
    object,
    T,
    Event | list[Event],
    Box[Event],
    Iterable[Any],
    Iterable[str],
    Callable[[], None],
    "Nothing",  # as if it were imported for the type checker alone
    "list[Nothing]",
    "no python at all (",
    "1 / 0",
    5,
    None,
]


@pytest.mark.parametrize("annotation", LISTS, ids=str)
def test_a_handler_that_is_annotated_for_a_list_needs_batch(registry, annotation):
    with pytest.raises(RegistrationError, match="batch="):
        registry.add_handler(annotated(annotation), group="a", name="n")
    registry.add_handler(annotated(annotation), group="a", name="n", batch=5)


@pytest.mark.parametrize("annotation", EVENTS, ids=str)
def test_a_handler_that_is_annotated_for_an_event_takes_no_batch(registry, annotation):
    with pytest.raises(RegistrationError, match="takes a list"):
        registry.add_handler(annotated(annotation), group="a", name="n", batch=5)
    registry.add_handler(annotated(annotation, returns="Nothing"), group="a", name="n")


@pytest.mark.parametrize("annotation", EITHER, ids=str)
def test_an_annotation_that_says_nothing_of_the_kind_is_no_obstacle(registry, annotation):
    registry.add_handler(annotated(annotation), group="a", name="n")
    registry.add_handler(annotated(annotation), group="a", name="m", batch=5)


class Called:
    def __call__(self, events: list[Event]) -> None:
        """Do nothing."""

    def method(self, events: "list[Event]") -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    "function",
    [
        Called(),
        Called().method,
        functools.partial(Called().method),
        functools.partial(annotated(list[Event])),
        functools.partial(lambda mailer, events: None, 1),
    ],
)
def test_annotations_of_objects_methods_and_partials_count_too(registry, function):
    if getattr(getattr(function, "func", None), "__name__", "") != "<lambda>":
        with pytest.raises(RegistrationError, match="batch="):
            registry.add_handler(function, group="a", name="n")
    registry.add_handler(function, group="a", name="n", batch=5)


def test_a_bound_argument_of_a_partial_is_not_taken_for_the_event(registry):
    def function(mailers: list[str], event: Event) -> None:
        """Do nothing."""

    registry.add_handler(functools.partial(function, []), group="a", name="n")
    with pytest.raises(RegistrationError, match="takes a list"):
        registry.add_handler(functools.partial(function, []), group="a", name="n", batch=5)


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
    from spark_outbox.registry.handlers import registry as of_the_project

    names = [registered.name for registered in of_the_project.handlers]
    assert "tests.challenges.handlers.thank_for_donation" in names
    assert [f.__name__ for f in of_the_project.sources[Challenge]] == ["events_from_challenge"]
