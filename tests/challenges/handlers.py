"""Handlers of the demo: each notes in a ledger that it was called, in the worker's transaction. Those
below have the events of `spark_demo --serve`, and some of them fail."""

import asyncio
from datetime import timedelta

from django.utils import timezone

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


# Of `spark_demo --serve`


class MailRefused(Exception):
    pass


class PartnerBusy(Exception):
    pass


@handler(r"^receipt_wanted$", max_attempts=1)
def mail_receipt(event: Event) -> None:
    """Fail for good on a wrong address; but whoever retries it after a minute finds it corrected."""
    emitted = event.created_at or timezone.now()
    if event["email"].endswith(".invalid") and timezone.now() - emitted < timedelta(minutes=1):
        raise MailRefused(f"no such mailbox: {event['email']!r}")
    note(event, "mail_receipt")


@handler(r"^partner_wants_news$", max_attempts=5, backoff=10)
def inform_partner(event: Event) -> None:
    """Fail at first, and be retried, if the partner is busy."""
    if event["is_busy"] and event.attempt < 3:
        raise PartnerBusy("503: come again later")
    note(event, "inform_partner")


@handler(r"^poster_wanted$")
async def print_poster(event: Event) -> None:
    """Take a while, and hold nobody up."""
    await asyncio.sleep(event["seconds"])
    await Handled.objects.acreate(key=event.key, handler="print_poster")


@handler(r"^reminder_due$")
def remind_members(event: Event) -> None:
    note(event, "remind_members")


def note(event: Event, name: str) -> None:
    Handled.objects.create(key=event.key, handler=name)
