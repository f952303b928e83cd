"""Mails about events: people write them in the admin, code says who gets them.

Nothing here needs the app registry: import it at any time.
"""

from collections.abc import Callable, Iterable
from functools import cache, wraps
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import TypeVar

from spark_outbox import Event, handler
from spark_outbox.errors import RegistrationError

__all__ = ["GROUP", "recipients"]

GROUP = "spark_mails"
"""The group of events that are one mail to one recipient each."""

Addresses = str | Iterable[str | None] | None
F = TypeVar("F", bound=Callable[..., Addresses])


def recipients(group: str, *, name: str | None = None) -> Callable[[F], F]:
    """Decorate a function that returns who gets the mail about an event whose group matches a regex.

    It gets the event, as a handler does, and returns an address, or several; empty ones are left out. If
    there are some, but no mail for the group, the event is discarded. The delivery is stored under
    `name`, by default the function's dotted path. Raises RegistrationError.
    """

    if not isinstance(group, str):
        raise RegistrationError('Write @recipients(r"^pattern"): it needs the pattern of its groups.')

    def register(function: F) -> F:
        if not callable(function) or iscoroutinefunction(function) or isasyncgenfunction(function):
            raise RegistrationError(f"{function!r} is no plain function that returns addresses.")
        if name is None and not hasattr(function, "__qualname__"):
            raise RegistrationError(f"{function!r} has no name of its own: give it one with name=…")
        handler(group, name=name)(_handing_out(function))
        return function

    return register


@cache  # the registry knows the same function again
def _handing_out(recipients: Callable[..., Addresses]) -> Callable[[Event], None]:
    @wraps(recipients)
    def hand_out(event: Event) -> None:
        from spark_outbox.contrib.mails import sending

        sending.hand_out(event, recipients)

    return hand_out
