"""Code in which no type checker finds an error."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

from django.utils import timezone

from shop.models import Numbered, Order
from spark_outbox import (
    BatchFailed,
    Discard,
    Event,
    Retry,
    aemit,
    aemit_many,
    emit,
    emit_many,
    handler,
    source,
)
from spark_outbox.models import OutboxEvent
from spark_outbox.testing import EmittedEvent, Outbox, capture_events, drain, emitted


def emits(order: Order) -> None:
    assert_type(emit("order_placed", f"order_placed_{order.pk}", order=order, by="web"), Event | None)
    emit("reminder", delay=timedelta(days=1))
    emit("reminder", delay=90, ordering_key="a", headers={"trace": 1}, using="default")
    emit("reminder", available_at=timezone.now(), on_duplicate="raise")
    emit(Event("reminder", "key", number=1))
    emit({"group": "reminder", "key": "key"}, on_duplicate="check")
    assert_type(emit_many(Event("reminder", number=number) for number in range(10)), int)
    emit_many([{"group": "reminder", "key": "key"}], using="default", chunk_size=100)


async def emits_from_async_code(events: AsyncIterator[Event]) -> None:
    assert_type(await aemit("reminder", "key", delay=timedelta(days=1), number=1), Event | None)
    await aemit(Event("reminder", "key"), on_duplicate="raise")
    assert_type(await aemit_many(events, chunk_size=10), int)
    await aemit_many([Event("reminder", "key")])


@handler(r"^order_")
def plain(event: Event) -> None:
    assert_type(event.group, str)
    assert_type(event.key, str)
    assert_type(event.id, int)
    assert_type(event.attempt, int)
    assert_type(event.created_at, datetime | None)
    assert_type(event.ordering_key, str | None)
    assert_type(event.headers, Mapping[str, Any])
    assert_type(event.payload, Mapping[str, Any])
    order: Order = event["order"]
    also: Order = event.order
    number: int = event.get("number", 0)
    if number:
        raise Retry("later", after=timedelta(hours=1))
    raise Discard(f"{order.email} {also.email}")


@handler(
    r"^order_",
    name="shop.with_a_policy",
    max_attempts=5,
    backoff=lambda attempt: attempt * 10.0,
    retry_for=(OSError,),
    discard_for=(Order.DoesNotExist, KeyError),
    timeout=timedelta(seconds=30),
)
def with_a_policy(event: Event) -> int:
    return event.attempt


@handler(r"^order_", backoff=[1, timedelta(minutes=1)], discard_for=(OSError,), timeout=2.5)
def of_a_mapping(event: Mapping[str, Any]) -> None: ...


@handler(r"^search_index$", batch=100)
def lists(events: list[Event]) -> None:
    errors = {event: ValueError(event.key) for event in events if event["number"] > 9}
    if errors:
        raise BatchFailed(errors)


@handler(r"^search_index$", batch=10, name="sequences")
def sequences(events: Sequence[Event]) -> None: ...


@handler(r"^webhook$", timeout=30)
async def asynchronous(event: Event) -> None: ...


@handler(r"^export$", atomic=False)
def detached(event: Event) -> None: ...


class Shop:
    def close(self, event: Event) -> None: ...


handler(r"^closed$", name="shop.close")(Shop().close)


@source(Order)
def of_orders(order: Order) -> Iterator[Event]:
    yield Event("order_placed", f"order_placed_{order.pk}", order=order)


@source(Order)
def of_orders_as_dicts(order: Order) -> list[dict[str, Any]] | None:
    return [{"group": "order_paid", "key": f"paid_{order.pk}"}] if order.email else None


@source(Numbered, on_save=False)
def of_an_abstract_model(numbered: Numbered) -> Iterator[Event]:
    yield Event("counted", f"{numbered.number}")


def names_stay_what_they_are(event: Event, order: Order) -> None:
    assert_type(with_a_policy(event), int)
    lists([event])
    assert_type(of_orders(order), Iterator[Event])


def looks() -> None:
    assert_type(OutboxEvent.objects.get(key="key").status, str)


def tests(outbox: Outbox) -> None:
    outbox.handle(plain, attempt=3, order=Order())
    outbox.handle("shop.close")
    outbox.fail(lists, on_attempt=1, with_=OSError)
    outbox.advance(timedelta(days=1))
    assert_type(outbox.drain(), int)
    assert_type(outbox.emitted("order_"), list[EmittedEvent])
    assert_type(outbox.assert_emitted("order_placed", number=1).status, str)
    assert_type(outbox.wait_for("key", timeout=10), EmittedEvent)
    with capture_events() as events:
        emit("reminder", available_at=datetime(2030, 1, 1, tzinfo=UTC))
    assert_type(events[0].key, str)
    drain()
    assert_type(emitted("reminder")[0].last_error, str)
