"""Model instances that handlers get: each handler its own, and as they are now."""

import pytest
from django.db import connection, connections, transaction

from spark_outbox import emit, emit_many
from spark_outbox.errors import InstanceGone, UnreadablePayload
from spark_outbox.events.references import Fetched, References
from spark_outbox.models import OutboxEvent
from spark_outbox.testing import drain, emitted
from spark_outbox.worker.loop import Worker
from tests.events.test_payload import Counting
from tests.probe.models import Basket, Line, Page, Unwieldy
from tests.tools import HOUR, statuses, wait_until_done, worker_thread

pytestmark = pytest.mark.django_db


def add_one(event):
    basket = event["basket"]
    basket.total += 1
    basket.save()


def emit_some(count=3, **payload):
    emit_many({"group": "g", "key": f"{n}", **payload} for n in range(count))


# Each its own


def test_what_a_failed_handler_did_to_a_value_in_place_is_not_saved_by_another(own_registry):
    basket = Basket.objects.create(notes={"of": ["all"]})
    emit_some(2, basket=basket)

    def spoil(event):
        notes = event["basket"].notes
        if event.key == "1":  # after 0 has fetched it for both
            notes["of"].append("spoilt")
            raise RuntimeError

    def save(event):
        if event.key == "1":
            event["basket"].save()

    own_registry.add_handler(spoil, group="g", name="spoil")
    own_registry.add_handler(save, group="g", name="save")
    drain(raise_exceptions=False)
    basket.refresh_from_db()
    assert basket.notes == {"of": ["all"]}


@pytest.mark.usefixtures("unhurried")
def test_what_can_be_changed_in_place_is_copied_and_not_fetched_again(own_registry):
    emit_some(3, basket=Basket.objects.create(notes={"a": [1]}))
    seen = []
    for name in "ab":
        own_registry.add_handler(lambda event: seen.append(event["basket"].notes), group="g", name=name)
    with connection.execute_wrapper(counting := Counting()):
        drain()
    assert seen == [{"a": [1]}] * 6
    assert len({id(notes["a"]) for notes in seen}) == 6
    assert counting.of("probe_basket") == 1


def test_an_instance_that_cannot_be_copied_is_fetched_for_each(own_registry):
    emit_some(2, it=Unwieldy.objects.create())
    seen = []
    for name in "ab":
        own_registry.add_handler(lambda event: seen.append(event["it"]), group="g", name=name)
    drain()
    assert len({id(it.lock) for it in seen}) == 4


@pytest.mark.parametrize("part", ["payload", "headers"])
@pytest.mark.parametrize("options", [{}, {"batch": 2}])
def test_what_a_handler_does_to_a_payload_or_headers_stays_with_it(own_registry, part, options):
    values = {"a": {"b": [1]}}
    emit("g", "key", **(values if part == "payload" else {"headers": values}))
    seen = []

    def spoil(events):
        (event,) = events if options else [events]
        seen.append(f"{dict(getattr(event, part))}")
        getattr(event, part)["a"]["b"].append("spoilt")

    for name in "ab":
        own_registry.add_handler(spoil, group="g", name=name, **options)
    drain()
    assert seen == [f"{values}"] * 2


@pytest.mark.django_db(transaction=True)
def test_async_handlers_can_read_headers_and_share_nothing_either(own_registry):
    basket = Basket.objects.create(notes={"a": 1})
    emit("g", "key", basket=basket, headers={"from": {"basket": basket}})
    seen = []

    async def spoil(event):
        for found in (event["basket"], event.headers["from"]["basket"]):
            seen.append(dict(found.notes))
            found.notes["spoilt"] = True
        event.headers["from"]["spoilt"] = True

    for name in "ab":
        own_registry.add_handler(spoil, group="g", name=name)
    with worker_thread():
        wait_until_done(1)
    assert seen == [{"a": 1}] * 4


# As they are now


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("alias", ["default", "other"])
def test_what_a_handler_wrote_is_seen_by_the_next_whatever_the_database(own_registry, alias):
    basket = Basket.objects.using(alias).create()
    emit_some(5, basket=basket)
    own_registry.add_handler(add_one, group="g")
    drain()
    basket.refresh_from_db()
    assert basket.total == 5


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_what_was_rolled_back_in_another_database_is_not_seen_by_the_next(own_registry):
    emit_some(2, basket=Basket.objects.using("other").create())
    seen = []

    def write_and_fail(event):
        with transaction.atomic(using="other"):
            Basket.objects.using("other").update(total=7)
            seen.append(event["basket"].total)
            raise RuntimeError

    own_registry.add_handler(write_and_fail, group="g")
    own_registry.add_handler(lambda event: seen.append(event["basket"].total), group="g", name="b")
    drain(raise_exceptions=False)
    assert seen == [7, 0] * 2


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_list_of_instances_in_another_database_is_one_query(own_registry):
    baskets = [Basket.objects.using("other").create() for _ in range(3)]
    emit("g", "key", baskets=baskets)
    own_registry.add_handler(lambda event: event["baskets"], group="g", name="h")
    with connections["other"].execute_wrapper(counting := Counting()):
        drain()
    assert counting.of("probe_basket") == 1


@pytest.mark.parametrize(
    "statement",
    [
        "select probe_change()",
        "select 1 from probe_change()",
        "with x as (select probe_change()) select 1 from x",
        "insert into challenges_handled (key, handler, note) values (probe_change(), '', '')",
        "call probe_change_too()",
        "select 1; update probe_basket set total = 100",
        "do $$begin perform probe_change(); end$$",
        "update PROBE_BASKET set total = 100",
        'update "public"."probe_basket" set total = 100',
    ],
)
def test_what_a_statement_of_any_kind_changed_is_seen_by_the_next(own_registry, statement):
    with connection.cursor() as cursor:
        cursor.execute(
            "create function probe_change() returns text language plpgsql as "
            "$$begin update probe_basket set total = 100; return ''; end$$"
        )
        cursor.execute(
            "create procedure probe_change_too() language sql as 'update probe_basket set total = 100'"
        )
    basket = Basket.objects.create()
    emit_some(2, basket=basket)

    def change_then_add(event):
        basket = event["basket"]
        if event.key == "0":
            with connection.cursor() as cursor:
                cursor.execute(statement)
        else:
            basket.total += 1
            basket.save()

    own_registry.add_handler(change_then_add, group="g")
    drain()
    basket.refresh_from_db()
    assert basket.total == 101


def test_what_a_handler_took_back_itself_is_not_seen_by_the_next(own_registry):
    emit_some(2, basket=Basket.objects.create())
    seen = []

    def try_it(event):
        try:
            with transaction.atomic():
                Basket.objects.update(total=7)
                seen.append(event["basket"].total)
                raise ValueError
        except ValueError:
            seen.append("undone")

    own_registry.add_handler(try_it, group="g")
    own_registry.add_handler(lambda event: seen.append(event["basket"].total), group="g", name="b")
    drain()
    assert seen == [7, "undone", 0] * 2


def test_reading_through_the_orm_keeps_what_was_fetched(own_registry):
    emit_some(9, basket=Basket.objects.create())

    def look(event):
        found = Basket.objects.filter(pk=event["basket"].pk, total__in=[0, 1]).exists()
        assert found
        assert Line.objects.count() == Line.objects.filter(basket=event["basket"]).count() == 0
        emit("other", event.key)

    own_registry.add_handler(look, group="g")
    fetches = Fetches()
    with connection.execute_wrapper(fetches):
        Worker(commit_interval=HOUR).drain()  # in one batch, however slow the machine
    assert fetches.count == 1


class Fetches:
    """Counts the queries by which references are fetched."""

    count = 0

    def __call__(self, execute, sql, params, many, context):
        self.count += sql.endswith('FROM "probe_basket" WHERE "probe_basket"."id" IN (%s)')
        return execute(sql, params, many, context)


def test_a_kept_event_is_fetched_for_alone_each_time(own_registry):
    kept = []
    own_registry.add_handler(kept.append, group="g", name="h")
    basket = Basket.objects.create()
    emit_some(2, basket=basket)
    drain()
    assert kept[0]["basket"].total == 0
    Basket.objects.update(total=5)
    assert kept[1]["basket"].total == 5


# Keys


@pytest.mark.usefixtures("unhurried")
def test_a_row_with_a_composite_key_is_a_reference(own_registry, django_assert_num_queries):
    basket = Basket.objects.create()
    lines = [Line.objects.create(basket=basket, number=n) for n in range(3)]
    for line in lines:
        emit("g", f"{line.number}", line=line, others=lines)
    assert OutboxEvent.objects.first().payload["line"] == {
        "$": ["model", "probe.line", {"$": ["tuple", [basket.pk, 0]]}, "default"]
    }
    seen = []

    def look(event):
        assert event["others"] == lines
        seen.append(event["line"].pk)

    own_registry.add_handler(look, group="g")
    with connection.execute_wrapper(counting := Counting()):
        drain()
    assert seen == [(basket.pk, n) for n in range(3)]
    assert counting.of("probe_line") == 1
    assert [event["line"] for event in emitted("g")] == lines


def test_a_row_with_a_composite_key_that_is_gone_fails_its_delivery_and_no_other(own_registry):
    basket = Basket.objects.create()
    for number in range(2):
        emit("g", f"{number}", line=Line.objects.create(basket=basket, number=number))
    Line.objects.filter(number=0).delete()
    own_registry.add_handler(lambda event: event["line"], group="g", name="h")
    with pytest.raises(InstanceGone, match=rf"probe\.Line \({basket.pk}, 0\) .* is gone"):
        drain()
    assert statuses() == {"0": "failed", "1": "done"}


@pytest.mark.parametrize("key", ["1", "[1]", '{"$": ["tuple", [1]]}', '{"$": ["tuple", [1, "x"]]}'])
def test_what_is_no_composite_key_is_unreadable(own_registry, key):
    with connection.cursor() as cursor:
        cursor.execute(
            "insert into spark_outbox_event (key, event_group, payload) values ('k', 'g', %s)",
            ['{"a": {"$": ["model", "probe.line", ' + key + ', "default"]}}'],
        )
    own_registry.add_handler(lambda event: event["a"], group="g", name="h")
    with pytest.raises(UnreadablePayload, match=r"is no key of probe\.Line"):
        drain()


def test_a_key_that_forms_would_refuse_is_a_key_all_the_same():
    for slug in ["home", "a.b", ""]:
        page = Page.objects.create(slug=slug)
        emit("g", slug or "empty", page=page)
    assert [event["page"].pk for event in emitted("g")] == ["home", "a.b", ""]


@pytest.mark.parametrize(
    ("model", "pk"),
    [
        ("probe.basket", 2**63),
        ("probe.basket", -(2**63) - 1),
        ("probe.page", "a\0"),
        ("probe.page", None),
    ],
)
def test_a_key_that_postgresql_could_not_compare_is_unreadable(model, pk):
    with pytest.raises(UnreadablePayload, match="is no key of"):
        References().get(model, pk, "default", beside=Fetched(lambda *_: iter(())))
