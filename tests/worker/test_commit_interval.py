"""The commit interval: when a batch ends, and who starts in a fresh transaction."""

import itertools

import pytest
from django.db import connection

from spark_outbox import emit, emit_many
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Challenge
from tests.tools import HOUR, Clock, connect, make_challenge

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_batch_is_committed_once_the_commit_interval_is_over(own_registry):
    clock = Clock()

    def take_20_ms(event):
        clock.now += 0.02

    own_registry.add_handler(take_20_ms, group="")
    emit_many({"group": "g", "key": f"{n}"} for n in range(10))
    worker = Worker(clock=clock, commit_interval=0.05)
    assert worker.handle_batch() == 3
    # And the next claim holds no more rows than that.
    assert worker._claims.size.fitting == 3
    assert worker.handle_batch() == 3


def test_a_slow_handler_starts_in_a_fresh_transaction(own_registry):
    """Locks that a fast handler took must not be held while a stranger's slow one runs."""
    clock, transactions = Clock(), []

    def handle(event):
        with connection.cursor() as cursor:
            cursor.execute("select pg_current_xact_id()::text")
            transactions.append((event.key, cursor.fetchone()[0]))
        if event.group == "slow":
            clock.now += 1

    own_registry.add_handler(handle, group="slow", name="slow")
    own_registry.add_handler(handle, group="fast", name="fast")
    for number in range(4):
        emit("slow", f"slow {number}")
        emit("fast", f"fast {number}")
    worker = Worker(clock=clock)
    while worker.handle_batch():
        pass
    by_transaction = {}
    for key, transaction_id in transactions[1:]:  # at first nobody knows that it is slow
        by_transaction.setdefault(transaction_id, []).append(key)
    assert len(transactions) == 8
    for keys in by_transaction.values():
        assert not any(key.startswith("slow") for key in keys[1:])


def test_a_handler_that_got_fast_again_shares_transactions_again(own_registry):
    clock, slow = Clock(), [1.0, 0.5] + [0.0] * 100

    def handle(event):
        clock.now += slow.pop(0)

    own_registry.add_handler(handle, group="")
    emit_many({"group": "g", "key": f"{n}"} for n in range(60))
    worker = Worker(clock=clock)
    sizes = list(itertools.takewhile(bool, (worker.handle_batch() for _ in range(60))))
    assert sizes[:2] == [1, 1]
    assert max(sizes) > 10


def test_after_a_deadlock_or_lock_timeout_the_batch_is_committed_at_once(own_registry):
    make_challenge()

    def handle(event):
        if event.key == "2":
            with connection.cursor() as cursor:
                cursor.execute("set local lock_timeout = '10ms'")
            Challenge.objects.select_for_update().get()

    own_registry.add_handler(handle, group="")
    emit_many({"group": "g", "key": f"{n}"} for n in range(6))
    with connect() as other, other.transaction():
        other.execute("select from challenges_challenge for update")
        assert Worker(commit_interval=HOUR).handle_batch() == 3
