"""Mistakes. The comment at the end of a line names the errors that mypy and pyright find in it."""

from collections.abc import Iterator
from datetime import timedelta

from shop.models import Invoice, Order
from spark_outbox import BatchFailed, Event, Retry, aemit, emit, emit_many, handler, source
from spark_outbox.testing import Outbox


def emits(order: Order) -> None:
    emit()  # error: call-arg, reportCallIssue
    emit(order)  # error: arg-type, reportArgumentType
    emit("reminder", 5)  # error: arg-type, reportArgumentType
    emit("reminder", "key", timedelta(days=1))  # error: call-arg, reportCallIssue
    emit("reminder", delay="tomorrow")  # error: arg-type, reportArgumentType
    emit("reminder", available_at=timedelta(days=1))  # error: arg-type, reportArgumentType
    emit("reminder", on_duplicate="rais")  # error: arg-type, reportArgumentType
    emit("reminder", headers="trace")  # error: arg-type, reportArgumentType
    print(emit("reminder").id)  # error: union-attr, reportOptionalMemberAccess
    emit_many("reminder")  # error: arg-type, reportArgumentType
    emit_many([order])  # error: list-item, reportArgumentType
    emit_many({"group": "reminder", "key": "key"})  # error: dict-item, reportArgumentType
    Event(key="key")  # error: call-arg, reportCallIssue
    Event("reminder", 5)  # error: arg-type, reportArgumentType


async def emits_from_async_code() -> None:
    await aemit("reminder", delay="tomorrow")  # error: arg-type, reportArgumentType
    await aemit(5)  # error: arg-type, reportArgumentType
    aemit("reminder")  # error: unused-coroutine, reportUnusedCoroutine


@handler  # error: call-overload, reportArgumentType
def without_a_pattern(event: Event) -> None: ...


@handler("reminder", batch=10)  # error: type-var, reportArgumentType
def one_event_with_batch(event: Event) -> None: ...


@handler("reminder")  # error: type-var, reportArgumentType
def a_list_without_batch(events: list[Event]) -> None: ...


@handler("reminder")  # error: type-var, reportArgumentType
async def an_async_list(events: list[Event]) -> None: ...


@handler("reminder", batch=10, atomic=False)  # error: call-overload, reportCallIssue
def a_detached_list(events: list[Event]) -> None: ...


@handler("reminder")  # error: type-var, reportArgumentType
def no_argument() -> None: ...


@handler("reminder")  # error: type-var, reportArgumentType
def two_arguments(event: Event, order: Order) -> None: ...


@handler("reminder")  # error: type-var, reportArgumentType
def the_instance(order: Order) -> None: ...


@handler("reminder")  # error: type-var, reportArgumentType
def a_dict(event: dict[str, object]) -> None: ...


@handler("reminder", retry_for=OSError)  # error: call-overload, reportArgumentType
def not_a_tuple(event: Event) -> None: ...


@handler("reminder", timeout="soon")  # error: call-overload, reportArgumentType
def no_duration(event: Event) -> None: ...


@handler("reminder", tiemout=5)  # error: call-overload, reportCallIssue
def no_such_option(event: Event) -> None: ...


@handler("reminder")
def uses_its_event(event: Event) -> None:
    print(event.created_at.year)  # error: union-attr, reportOptionalMemberAccess
    print(event.id + "1")  # error: operator, reportOperatorIssue
    event.key = 5  # error: assignment, reportAttributeAccessIssue
    raise Retry(after="tomorrow")  # error: arg-type, reportArgumentType


@handler("reminder", batch=10)
def fails_a_list(events: list[Event]) -> None:
    raise BatchFailed(events)  # error: arg-type, reportArgumentType


@source  # error: type-var, reportArgumentType
def without_a_model(order: Order) -> Iterator[Event]:
    yield Event("reminder")


@source("shop.Order")  # error: arg-type, reportArgumentType
def of_a_name(order: Order) -> Iterator[Event]:
    yield Event("reminder")


@source(Outbox)  # error: type-var, reportArgumentType
def of_no_model(outbox: Outbox) -> Iterator[Event]:
    yield Event("reminder")


@source(Order)  # error: arg-type, reportArgumentType
def of_another_model(invoice: Invoice) -> Iterator[Event]:
    yield Event("reminder")


@source(Order)  # error: type-var, reportArgumentType
def of_texts(order: Order) -> Iterator[str]:
    yield "reminder"


@source(Order)  # error: type-var, reportArgumentType
def of_one_event(order: Order) -> Event:
    return Event("reminder")


@source(Order)  # error: type-var, reportArgumentType
async def asynchronous(order: Order) -> list[Event]:
    return [Event("reminder")]


def tests(outbox: Outbox) -> None:
    outbox.drian()  # error: attr-defined, reportAttributeAccessIssue
    outbox.advance("1 day")  # error: arg-type, reportArgumentType
    outbox.assert_emitted()  # error: call-arg, reportCallIssue
    outbox.handle(5)  # error: arg-type, reportArgumentType
    outbox.fail("shop.handler", with_="OSError")  # error: arg-type, reportArgumentType
