"""The alarm of a timeout, at the worst of moments: it fails its own event alone, and rings once."""

import signal

import pytest
from django.db import connection
from django.utils import timezone

from spark_outbox import Event, emit, handler
from spark_outbox.errors import HandlerTimeout
from spark_outbox.models import Delivery
from spark_outbox.processes.guard import Guard
from spark_outbox.registry.policy import Policy
from spark_outbox.store import isolating
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.tools import HOUR, PATIENCE, deliveries, note, statuses, work
from tests.worker.neighbours import KEYS

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("own_session")]


@pytest.fixture
def late_guard():
    """A guard whose alarm rings as it is about to be stopped, once a handler `is_late`."""

    class LateGuard(Guard):
        is_late = False

        def stop(self):
            if self.is_late:  # Python runs signal handlers as a function begins, too
                self.is_late = False
                raise HandlerTimeout
            super().stop()

    before = signal.getsignal(signal.SIGALRM)
    yield LateGuard()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_an_alarm_that_rings_as_a_handler_returns_does_not_ring_again(
    own_registry, late_guard, atomic, error
):
    @handler("", name="h", atomic=atomic, timeout=PATIENCE)
    def run(event):
        late_guard.is_late = True
        if error is not None:
            raise error

    emit("g", "key")
    Worker(guard=late_guard).drain()
    assert not late_guard.is_late
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert deliveries() == {"h": ("pending", 1)}


def test_an_alarm_that_rings_as_the_event_loop_comes_to_rest_ends_no_worker(own_registry, late_guard):
    @handler("", name="h", timeout=PATIENCE)
    async def run(event):
        late_guard.is_late = True

    emit("g", "key")
    work(guard=late_guard)
    assert not late_guard.is_late
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert statuses() == {"key": "done"}


@pytest.mark.parametrize("is_async", [False, True])
def test_an_alarm_that_rings_as_a_payload_is_read_charges_no_other_event(
    own_registry, monkeypatch, is_async
):
    """The savepoint that was to be taken may not be there: then nothing of the batch can be kept."""
    rings = []
    savepoint = isolating.savepoint

    def ring(sql, *, using):
        if not rings and sql.startswith(("savepoint", "set local", "release")):
            rings.append(sql)
            raise HandlerTimeout
        savepoint(sql, using=using)

    def check(event):
        if event.key == "bad" and not rings:
            monkeypatch.setattr(isolating, "savepoint", ring)
            connection.connection.execute("select 1")

    for name in ("check", "load"):
        original = getattr(Event, name)
        monkeypatch.setattr(
            Event, name, lambda event, original=original: (check(event), original(event))[1]
        )

    async def note_later(event):
        await Handled.objects.acreate(key=event.key, handler="async")

    function = note_later if is_async else note
    own_registry.add_handler(function, group="^g$", name="h", policy=Policy(backoff=3600))
    own_registry.add_handler(note, group="^plain$", name="plain")
    for key in KEYS:
        emit("g" if key != "after 1" else "plain", key, at=timezone.now())
    work(commit_interval=HOUR)
    assert rings
    assert statuses() == {"before": "done", "bad": "pending", "after 1": "done", "after 2": "done"}
    assert {d.event.key for d in Delivery.objects.select_related("event")} == {"bad"}
    assert Delivery.objects.get().attempts == 1
