"""Inspects functions before they are called: their name, their kind, and their first argument.

If something can't be found out, such as an annotation that does not resolve, the function is accepted.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from spark_outbox.errors import RegistrationError
from spark_outbox.events.event import Event

Function = Callable[..., object]


class Adapted:
    """A source, and what is made of each of its events or None. It is equal to the source itself."""

    def __init__(self, source: Callable[..., Any], adapt: Callable[[Any], Any] | None) -> None:
        self.func = source
        self._adapt = adapt

    def __call__(self, instance: Any) -> Iterable[Any]:
        events = self.func(instance) or ()
        return events if self._adapt is None else map(self._adapt, events)

    def __eq__(self, other: object) -> bool:
        return bool(self.func == (other.func if isinstance(other, Adapted) else other))

    def __hash__(self) -> int:
        return hash(self.func)


class Swept(Adapted):
    """A source that only sweeps call, not `save()`."""


def path_of(function: Function) -> str:
    """Return `module.qualname`; for a partial, of its function; for an object, of its class."""
    function = unwrap_partial(function)
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    module = getattr(named, "__module__", None) or type(getattr(function, "__self__", None)).__module__
    return f"{module}.{named.__qualname__}"


def dotted_path(function: Function) -> str:
    """Return `module.qualname`. Raises RegistrationError if the object has no name of its own."""
    try:
        return f"{function.__module__}.{function.__qualname__}"
    except AttributeError:
        raise RegistrationError(
            f"{function!r} has no name of its own: give it one with name=…"
        ) from None


def has_name_of_its_own(function: Function) -> bool:
    """Return whether no other function can have its path: it belongs to a module or a class."""
    owner = getattr(function, "__self__", None)
    return (
        not isinstance(function, functools.partial)
        and "<" not in getattr(function, "__qualname__", "<")
        and (owner is None or isinstance(owner, type | types.ModuleType))
    )


def unwrap_partial(function: Function) -> Function:
    while isinstance(function, functools.partial | Adapted):
        function = function.func
    return function


def is_generator(function: Function) -> bool:
    """Return whether it is a generator function, async or not: a call would run none of its code."""
    return _is(function, inspect.isgeneratorfunction) or _is(function, inspect.isasyncgenfunction)


def is_async(function: Function) -> bool:
    """Return whether it is a coroutine function, or an async generator function."""
    return _is(function, inspect.iscoroutinefunction) or _is(function, inspect.isasyncgenfunction)


def _is(function: Function, kind: Callable[[object], bool]) -> bool:
    function = unwrap_partial(function)
    return kind(function) or kind(getattr(function, "__call__", None))  # noqa: B004, it may differ


def misfit(function: Function) -> str:
    """Return why `function` can't be called with one argument; "" if it can."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # it is built in
        return ""
    try:
        signature.bind(None)
    except TypeError as error:
        return f"{error} in {path_of(function)}{signature}"
    return ""


def is_for_lists(function: Function) -> bool | None:
    """Return True if its first argument is annotated for a list of events, False if for one event.

    Return None if the annotation is missing, or fits both.
    """
    hint = _first_hint(function)
    kinds = {_is_list(each) for each in _alternatives(hint)}
    return kinds.pop() if len(kinds) == 1 else None


def check_annotation(function: Function, batch: int | None) -> None:
    """Raise RegistrationError if the first argument is annotated for something else than it gets."""
    for_lists = is_for_lists(function)
    path = path_of(function)
    if batch is None and for_lists:
        raise RegistrationError(
            f"{path} is annotated for a list of events, but is called with one at a time. Give batch=…, "
            "the most events of a list; or annotate it for an Event."
        )
    if batch is not None and for_lists is False:
        raise RegistrationError(
            f"{path} is annotated for one event, but with batch=… it takes a list. Annotate it for a "
            "list[Event], or drop batch=…"
        )


def check_argument(function: Function, what: str) -> None:
    """Raise RegistrationError if it can't be called with one argument."""
    if why := misfit(function):
        raise RegistrationError(f"{function!r} is called with one argument, {what}: {why}.")


def _first_hint(function: Function) -> Any:
    try:
        first = next(iter(inspect.signature(function).parameters.values()))
        annotated: Any = unwrap_partial(function)
        if not inspect.isroutine(annotated):
            annotated = annotated.__call__
        holder = types.SimpleNamespace(__annotations__={"first": first.annotation})
        names = getattr(inspect.unwrap(annotated), "__globals__", {})
        return typing.get_type_hints(holder, globalns=names)["first"]
    except Exception:  # noqa: BLE001, annotations may be anything
        return None


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        return [each for each in typing.get_args(hint) if each is not type(None)]
    return [hint]


def _is_list(hint: Any) -> bool | None:
    """Return True if `hint` is for a list, False if it is for an event, None if that is unclear."""
    kind = typing.get_origin(hint) or hint
    try:
        takes_list, takes_event = issubclass(list, kind), issubclass(Event, kind)
        if takes_list and takes_event:  # as an Iterable does
            return True if typing.get_args(hint) == (Event,) else None
        return takes_list if takes_list or takes_event or issubclass(kind, Event) else None
    except TypeError:
        return None
