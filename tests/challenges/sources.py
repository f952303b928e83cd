"""Sources of the demo: what happens to challenges and donations, as events."""

from collections.abc import Iterator
from datetime import date
from typing import Any

from spark_outbox import Event, source
from tests.challenges.models import Challenge, Donation


@source(Challenge)
def events_from_challenge(challenge: Challenge) -> Iterator[dict[str, Any]]:
    if not challenge.is_active:
        return
    yield {
        "group": "challenge_created",
        "key": f"challenge_created_{challenge.pk}",
        "challenge": challenge,
    }
    if challenge.end_date < date.today():
        yield {
            "group": "challenge_ended",
            "key": f"challenge_ended_{challenge.pk}",
            "challenge": challenge,
        }


@source(Donation)
def events_from_donation(donation: Donation) -> Iterator[Event]:
    yield Event(
        "donation_received",
        f"donation_received_{donation.pk}",
        challenge=donation.challenge,
        amount=donation.amount,
    )
