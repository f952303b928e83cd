"""The decorators that fill the registry: `handler` and `source`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, overload

from django.db.models import Model

from spark_outbox.errors import RegistrationError
from spark_outbox.events.event import Event
from spark_outbox.registry.backoff import Backoff, Seconds
from spark_outbox.registry.handlers import HandlerFunction, is_model, registry
from spark_outbox.registry.policy import Exceptions, Policy

# Type checkers quote these names in their errors.
TakesEvent = TypeVar("TakesEvent", bound=Callable[[Event], object])
TakesListOfEvents = TypeVar("TakesListOfEvents", bound=Callable[[list[Event]], object])
Instance = TypeVar("Instance", bound=Model)
Events = TypeVar("Events", bound=Iterable[Event | Mapping[str, Any]] | None)


@overload
def handler(
    group: str,
    *,
    name: str | None = None,
    max_attempts: int | None = None,
    backoff: Backoff | None = None,
    retry_for: Exceptions = (BaseException,),
    discard_for: Exceptions = (),
    timeout: Seconds | None = None,
    batch: None = None,
    atomic: bool = True,
) -> Callable[[TakesEvent], TakesEvent]: ...
@overload
def handler(
    group: str,
    *,
    batch: int,
    name: str | None = None,
    max_attempts: int | None = None,
    backoff: Backoff | None = None,
    retry_for: Exceptions = (BaseException,),
    discard_for: Exceptions = (),
    timeout: Seconds | None = None,
    atomic: Literal[True] = True,
) -> Callable[[TakesListOfEvents], TakesListOfEvents]: ...
def handler(
    group: str,
    *,
    name: str | None = None,
    max_attempts: int | None = None,
    backoff: Backoff | None = None,
    retry_for: Exceptions = (BaseException,),
    discard_for: Exceptions = (),
    timeout: Seconds | None = None,
    batch: int | None = None,
    atomic: bool = True,
) -> Callable[[HandlerFunction], HandlerFunction]:
    """Decorate a function that handles the events whose group matches the regex `group`.

    Handlers are called in registration order, with one Event each. Writes through the worker's database
    connection are committed together with the event's status, or not at all.

    A handler that raises is called again, up to `max_attempts` times in all. `backoff` is the first
    delay in seconds, which then doubles; or a list of delays; or a function of the attempt. Exceptions
    in `retry_for` lead to a retry; others fail at once. An exception in `discard_for` ends the handler's
    work on the event without a failure. A call that takes longer than `timeout` seconds is interrupted,
    and counts as a failed attempt.

    With `batch` the handler gets a list of up to that many events, and may raise BatchFailed. Calls of
    an `async def` handler run concurrently. With `atomic=False` a handler runs outside the worker's
    transaction, and may take as long as it needs. The writes of these two kinds are committed at once;
    both are at-least-once. Raises RegistrationError.
    """
    if not isinstance(group, str):
        raise RegistrationError('Write @handler(r"^pattern"): it needs the pattern of its groups.')

    policy = Policy(
        max_attempts=max_attempts,
        backoff=backoff,
        retry_for=retry_for,
        discard_for=discard_for,
        timeout=timeout,
    )

    def register(function: HandlerFunction) -> HandlerFunction:
        registry.add_handler(function, group=group, name=name, policy=policy, batch=batch, atomic=atomic)
        return function

    return register


def source(
    model: Callable[..., Instance],  # not type[Instance]: mypy would refuse an abstract model
    *,
    on_save: bool = True,
) -> Callable[[Callable[[Instance], Events]], Callable[[Instance], Events]]:
    """Decorate a generator function that yields the events of one instance of `model`.

    It runs after every save, in the saver's transaction, and in `manage.py process_spark_sources`; with
    `on_save=False` only in the latter. It runs for instances of subclasses, too. It may yield the same
    keys each time: each is handled once. Raises RegistrationError.
    """
    if not is_model(model):
        raise RegistrationError(f"Write @source(Model): it needs a model class, not {model!r}.")

    def register(function: Callable[[Instance], Events]) -> Callable[[Instance], Events]:
        registry.add_source(function, model=model, on_save=on_save)
        return function

    return register
