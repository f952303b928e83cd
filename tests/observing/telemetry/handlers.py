"""Handlers that end in every way. Each notes in the ledger which baggage it sees."""

import logging

from opentelemetry import baggage

from spark_outbox import BatchFailed, Discard, Event, Retry, emit, handler
from tests.challenges.models import Handled

logger = logging.getLogger(__name__)


def note(event: Event, name: str) -> None:
    Handled.objects.create(key=event.key, handler=name, note=str(baggage.get_baggage("tenant")))


@handler("^seen_plain$", name="plain")
def plain(event: Event) -> None:
    note(event, "plain")
    emit("seen_follow_up", f"after {event.key}")


@handler("^seen_follow_up$", name="follow up")
def follow_up(event: Event) -> None:
    note(event, "follow up")


@handler("^seen_async$", name="async call")
async def concurrent(event: Event) -> None:
    await Handled.objects.acreate(
        key=event.key, handler="async", note=str(baggage.get_baggage("tenant"))
    )


@handler("^seen_detached$", name="detached call", atomic=False)
def detached(event: Event) -> None:
    note(event, "detached")


@handler("^seen_list$", name="list", batch=10, max_attempts=1)
def several(events: list[Event]) -> None:
    secrets = [event["secret"] for event in events]
    error = ValueError(f"broken, with {len(secrets)} secrets")
    raise BatchFailed({event: error for event in events if event.key.startswith("bad")})


@handler("^seen_fails$", name="fails", max_attempts=2, backoff=0)
def fail(event: Event) -> None:
    secret = event["secret"]
    try:
        raise ValueError(f"broken, with {len(secret)} characters")
    except ValueError:
        if event.attempt == 2:
            logger.exception("The handler logs its error, too.")
        raise


@handler("^seen_reports$", name="reports")
def report(event: Event) -> None:
    secret = event["secret"]
    logger.error("Odd, with %s characters.", len(secret))


@handler("^seen_discarded$", name="discards")
def discard(event: Event) -> None:
    raise Discard("not needed")


@handler("^seen_retries$", name="retries", max_attempts=2)
def retry(event: Event) -> None:
    raise Retry("not yet", after=0)
