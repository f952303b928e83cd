"""Handlers of the demo: each notes in a ledger that it was called, in the worker's transaction."""

from spark_outbox import Event, handler
from tests.challenges.models import Handled


@handler(r"^challenge_")
def announce_challenge(event: Event) -> None:
    Handled.objects.create(key=event["key"], handler="announce_challenge", note=event["challenge"].title)


@handler(r"^donation_received$")
def thank_for_donation(event: Event) -> None:
    Handled.objects.create(
        key=event["key"],
        handler="thank_for_donation",
        note=f"{event['amount']} for {event['challenge'].title}",
    )
