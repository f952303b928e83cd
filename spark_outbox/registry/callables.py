"""What can be known of a function before it is called: its name, and whether it takes what it is given.

What can't be found out, such as an annotation that does not resolve, is never an objection.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from spark_outbox.events.event import Event

Function = Callable[..., object]


def path_of(function: Function) -> str:
    """Return `module.qualname`: of what a partial calls, or of an object's class."""
    function = unwrap_partial(function)
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    module = getattr(named, "__module__", None) or type(getattr(function, "__self__", None)).__module__
    return f"{module}.{named.__qualname__}"


def has_name_of_its_own(function: Function) -> bool:
    """Return whether nothing else bears its path: it stands in a module, or is the method of a class."""
    owner = getattr(function, "__self__", None)
    return (
        not isinstance(function, functools.partial)
        and "<" not in getattr(function, "__qualname__", "<")
        and (owner is None or isinstance(owner, type | types.ModuleType))
    )


def unwrap_partial(function: Function) -> Function:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def is_generator(function: Function) -> bool:
    """Return whether calling it runs nothing of it; also if it is async."""
    return _is(function, inspect.isgeneratorfunction) or _is(function, inspect.isasyncgenfunction)


def is_async(function: Function) -> bool:
    """Return whether what it returns is to be awaited, or iterated over with `async for`."""
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
    """Return whether its first argument is annotated for a list of events; None if nothing tells.

    False if it is annotated for one event.
    """
    hint = _first_hint(function)
    kinds = {_is_list(each) for each in _alternatives(hint)}
    return kinds.pop() if len(kinds) == 1 else None


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
    """Return whether a list fits and an event does not, or the other way round; None if neither."""
    kind = typing.get_origin(hint) or hint
    try:
        takes_list, takes_event = issubclass(list, kind), issubclass(Event, kind)
        if takes_list and takes_event:  # as an Iterable does
            return True if typing.get_args(hint) == (Event,) else None
        return takes_list if takes_list or takes_event or issubclass(kind, Event) else None
    except TypeError:
        return None
