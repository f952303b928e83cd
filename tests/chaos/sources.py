from collections.abc import Iterator

from spark_outbox import Event, source
from tests.chaos.models import Order


@source(Order)
def events_of_order(order: Order) -> Iterator[Event]:
    if order.group == "chaos_sourced":
        for key in filter(None, (order.twin, order.key)):
            yield Event(group=order.group, key=key, ordering_key=order.ordering_key)
