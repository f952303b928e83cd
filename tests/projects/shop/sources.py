from collections.abc import Iterator
from typing import Any

from django.db.models.signals import post_save
from django.dispatch import receiver
from oscar.apps.order.models import Line, Order

from spark_outbox import source

SPOILT = "Spoilt"
"""The title of a product that can be put into a basket, but not be sold."""


@source(Order)
def ordered(order: Order) -> Iterator[dict[str, Any]]:
    yield {"group": "ordered", "key": f"ordered_{order.number}", "about": order}


@source(Line)
def sold(line: Line) -> Iterator[dict[str, Any]]:
    yield {"group": "sold", "key": f"sold_{line.pk}", "about": line}


@receiver(post_save, sender=Line)
def refuse_what_is_spoilt(instance: Line, **_: Any) -> None:
    """Have Oscar roll back to its savepoint, and go on."""
    if instance.title == SPOILT:
        raise ValueError(SPOILT)
