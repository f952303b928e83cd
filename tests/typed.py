"""What mypy says of code that uses the library: each `type: ignore` is an error that it must find."""

from collections.abc import Iterator
from typing import Any

from spark_outbox import Event, source
from tests.challenges.models import Challenge, Donation
from tests.probe.models import Tracked


def examples() -> None:
    @source(Challenge)
    def good(challenge: Challenge) -> Iterator[Event]:
        yield Event("g", challenge.title)

    @source(Challenge)
    def also_good(challenge: Challenge) -> list[dict[str, Any]] | None:
        return [{"group": "g", "key": challenge.title}] if challenge.is_active else None

    @source(Tracked)  # type: ignore[type-abstract]
    def of_an_abstract_model(tracked: Tracked) -> Iterator[Event]:
        yield Event("g", f"{tracked.number}")

    @source(Challenge)
    def untyped(challenge):  # type: ignore[no-untyped-def]
        yield Event("g", challenge.title)

    @source(Challenge)  # type: ignore[arg-type]
    def of_another_model(donation: Donation) -> Iterator[Event]:
        yield Event("g", f"{donation.amount}")

    @source(Challenge)  # type: ignore[type-var]
    def of_no_events(challenge: Challenge) -> Iterator[str]:
        yield challenge.title

    @source  # type: ignore[arg-type, type-var]
    def without_its_model(challenge: Challenge) -> Iterator[Event]:
        yield Event("g", challenge.title)
