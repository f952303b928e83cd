"""The promises, against a plain model: hypothesis drives emits, rollbacks, dispatch, failures, deaths
and time on a real PostgreSQL, and after every step the two must agree."""

from dataclasses import dataclass, field

import pytest
from django.db import OperationalError, connection, transaction
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from spark_outbox import emit, emit_many
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.registry.handlers import Registry
from spark_outbox.registry.policy import Policy
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.tools import HOUR, connect

HANDLERS = ("one", "two", "list")
MAX_ATTEMPTS = 3

keys = st.sampled_from([f"key {n}" for n in range(16)])
ordering_keys = st.sampled_from([None, "o", "o", "p"])


@dataclass
class Modelled:
    """What the model knows of one event."""

    number: int
    ordering_key: str | None
    status: str = "pending"
    delayed: bool = False
    waits: bool = False  # for its next attempt
    deliveries: dict[str, list] = field(default_factory=dict)  # handler -> [status, attempts]


class Outbox(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        with connection.cursor() as cursor:
            cursor.execute("truncate spark_outbox_event, spark_outbox_delivery, challenges_handled")
        self.events: dict[str, Modelled] = {}
        self.effects: dict[tuple[str, str], int] = {}
        self.calls: list[str] = []
        self.broken: set[str] = set()  # handlers that fail
        self.dies_at: str | None = None  # the key whose handling takes the connection down
        self.registry = Registry()
        for name in HANDLERS:
            self.registry.add_handler(
                self.handler(name),
                group="^g$",
                name=name,
                policy=Policy(max_attempts=MAX_ATTEMPTS, backoff=3600),
                batch=3 if name == "list" else None,
            )

    def handler(self, name):
        def handle_list(events):
            for event in events:
                self.handle(event, name)

        return handle_list if name == "list" else lambda event: self.handle(event, name)

    def handle(self, event, name):
        self.calls.append(event.key)
        Handled.objects.create(key=event.key, handler=name)
        if event.key == self.dies_at:
            with connect() as other:
                pid = connection.connection.info.backend_pid
                other.execute("select pg_terminate_backend(%s, 10000)", [pid])
            connection.cursor().execute("select 1")
        if name in self.broken:
            raise RuntimeError(name)

    # What happens to an outbox

    @rule(key=keys, ordering_key=ordering_keys, group=st.sampled_from(["g", "g", "g", "nobody"]))
    def emit(self, key, ordering_key, group):
        stored = emit(group, key, ordering_key=ordering_key)
        assert (stored is not None) == (key not in self.events)
        self.add(key, ordering_key, group)

    @rule(key=keys)
    def emit_for_later(self, key):
        emit("g", key, delay=3600)
        self.add(key, None, "g", delayed=True)

    @rule(some=st.lists(keys, max_size=4), ordering_key=ordering_keys)
    def emit_many(self, some, ordering_key):
        new = emit_many({"group": "g", "key": key, "ordering_key": ordering_key} for key in some)
        assert new == len(set(some) - set(self.events))
        for key in some:
            self.add(key, ordering_key, "g")

    @rule(key=keys, savepoint=st.booleans())
    def emit_and_roll_back(self, key, savepoint):
        with transaction.atomic():
            if savepoint:
                with transaction.atomic():
                    emit("g", key)
                    transaction.set_rollback(True)
            else:
                emit("g", key)
                transaction.set_rollback(True)

    @rule(broken=st.sets(st.sampled_from(HANDLERS)), time_passes=st.booleans())
    def dispatch(self, broken, time_passes):
        if time_passes:
            self.let_time_pass()
        self.broken = broken
        Worker(registry=self.registry).drain()
        self.model_dispatch()

    @precondition(lambda self: self.ready())
    @rule(data=st.data())
    def die_while_handling(self, data):
        """The server drops the connection in the middle of a batch: as if it had never been claimed."""
        self.dies_at = data.draw(st.sampled_from(self.ready()))
        self.broken = set()  # else a list may fail before its turn comes
        before = len(self.calls)
        with pytest.raises(OperationalError):
            Worker(registry=self.registry, commit_interval=HOUR).handle_batch(sweep=True)
        assert self.dies_at in self.calls[before:]
        del self.calls[before:]
        self.dies_at = None
        connection.close()

    def let_time_pass(self):
        with connection.cursor() as cursor:
            for table in ("spark_outbox_event", "spark_outbox_delivery"):
                cursor.execute(
                    f"update {table} set available_at = statement_timestamp() "
                    "where status = 'pending' and available_at is not null"
                )
        for event in self.events.values():
            event.delayed = event.waits = False

    @rule()
    def retry_what_failed_by_hand(self):
        OutboxEvent.objects.filter(status="failed").update(
            status="pending", available_at=None, finished_at=None
        )
        Delivery.objects.filter(status="failed").update(status="pending", attempts=0)
        for event in self.events.values():
            if event.status == "failed":
                event.status = "pending"
                for delivery in event.deliveries.values():
                    if delivery[0] == "failed":
                        delivery[:] = ["pending", 0]

    # The plain model

    def add(self, key, ordering_key, group, *, delayed=False):
        if key not in self.events:
            event = Modelled(len(self.events), ordering_key, delayed=delayed)
            event.deliveries = {name: ["pending", 0] for name in HANDLERS} if group == "g" else {}
            self.events[key] = event

    def ready(self):
        """Return the keys that the next batch is sure to hold."""
        ready = OutboxEvent.objects.filter(status="pending", available_at=None, group="g")
        return sorted(key for key in ready.values_list("key", flat=True) if self.is_free(key))

    def is_free(self, key):
        event = self.events[key]
        if event.status != "pending" or event.delayed or event.waits:
            return False
        return event.ordering_key is None or not any(
            other.number < event.number and other.status in ("pending", "failed")
            for other in self.events.values()
            if other.ordering_key == event.ordering_key
        )

    def model_dispatch(self):
        while free := [key for key in self.events if self.is_free(key)]:
            for key in free:
                self.model_handling(key, self.events[key])

    def model_handling(self, key, event):
        if not event.deliveries:
            event.status = "unhandled"
            return
        for name, delivery in event.deliveries.items():
            if delivery[0] == "pending":
                delivery[1] += 1
                if name not in self.broken:
                    delivery[0] = "done"
                    self.effects[key, name] = self.effects.get((key, name), 0) + 1
                elif delivery[1] >= MAX_ATTEMPTS:
                    delivery[0] = "failed"
        states = {delivery[0] for delivery in event.deliveries.values()}
        event.waits = "pending" in states
        if not event.waits:
            event.status = "failed" if "failed" in states else "done"

    # The promises

    @invariant()
    def an_event_exists_if_and_only_if_its_transaction_committed_and_has_the_modelled_state(self):
        stored = dict(OutboxEvent.objects.values_list("key", "status"))
        assert stored == {key: event.status for key, event in self.events.items()}

    @invariant()
    def each_effect_is_there_once_if_and_only_if_its_delivery_is_done(self):
        rows = [tuple(row) for row in Handled.objects.values_list("key", "handler")]
        assert len(rows) == len(set(rows))
        assert dict.fromkeys(rows, 1) == self.effects

    @invariant()
    def each_delivery_has_the_modelled_attempts(self):
        for delivery in Delivery.objects.select_related("event"):
            expected = self.events[delivery.event.key].deliveries[delivery.handler]
            assert [delivery.status, delivery.attempts] == expected

    @invariant()
    def an_unfinished_event_says_when_it_goes_on(self):
        for event in OutboxEvent.objects.filter(status="pending"):
            modelled = self.events[event.key]
            assert (event.available_at is not None) >= (modelled.delayed or modelled.waits)

    @invariant()
    def events_of_one_key_were_handled_in_order(self):
        for ordering_key in ("o", "p"):
            called = [self.events[key] for key in self.calls]
            numbers = [event.number for event in called if event.ordering_key == ordering_key]
            assert numbers == sorted(numbers)


@pytest.mark.django_db(transaction=True)
def test_the_outbox_keeps_its_promises(settings):
    settings.SPARK_OUTBOX = {"BREAK_AFTER": None}
    run_state_machine_as_test(
        Outbox,
        settings=hypothesis_settings(
            max_examples=50,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
