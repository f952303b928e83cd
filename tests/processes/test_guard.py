"""What guards a worker's calls: notes of what is in hand, and an alarm that ends a call."""

import signal
import threading

import pytest

from spark_outbox.errors import HandlerTimeout
from spark_outbox.processes import guard
from spark_outbox.processes.guard import Guard, Unguarded
from spark_outbox.processes.slot import NEVER, Slot

PATIENCE = 30


@pytest.fixture(autouse=True)
def no_alarm_rings_after_a_test():
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_call_that_takes_too_long_is_interrupted():
    guarded = Guard()
    with pytest.raises(HandlerTimeout):
        try:
            guarded.start(0.01)
            threading.Event().wait(PATIENCE)
        finally:
            guarded.stop()


def test_a_call_that_catches_the_alarm_is_interrupted_again():
    guarded = Guard()
    guarded.start(PATIENCE)
    assert signal.getitimer(signal.ITIMER_REAL)[1] == guard.AGAIN
    for _ in range(3):
        with pytest.raises(HandlerTimeout):
            signal.raise_signal(signal.SIGALRM)
    guarded.stop()


def test_nothing_is_interrupted_by_an_alarm_that_python_tells_of_after_the_call():
    guarded = Guard()
    guarded.start(PATIENCE)
    guarded.stop()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    signal.raise_signal(signal.SIGALRM)


def test_an_alarm_that_rings_as_it_is_stopped_interrupts_nothing(monkeypatch):
    guarded = Guard()
    guarded.start(PATIENCE)
    set_timer = signal.setitimer

    def ring_first(*arguments):
        signal.raise_signal(signal.SIGALRM)
        return set_timer(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(signal, "setitimer", ring_first)
        guarded.stop()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_alarm_that_rings_as_it_is_set_finds_its_deadline_noted(monkeypatch):
    slot = Slot(0)
    guarded = Guard(slot)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "setitimer", lambda *_: signal.raise_signal(signal.SIGALRM))
        with pytest.raises(HandlerTimeout):
            guarded.start(PATIENCE)
    assert slot.due() < NEVER
    guarded.stop()


def test_the_supervisor_reads_what_is_in_hand_and_when_it_has_to_end():
    slot = Slot(0)
    guarded = Guard(slot)
    assert slot.waits_since() < NEVER
    guarded.take_in_hand((7, 1), (8, 1))
    guarded.start(PATIENCE)
    assert slot.in_hand() == guarded.in_hand() == [(7, 1), (8, 1)]
    assert slot.due() < NEVER
    assert slot.waits_since() == NEVER  # for nothing but the handler
    guarded.stop()
    guarded.put_down()
    assert (slot.in_hand(), slot.due()) == ([], NEVER)
    assert slot.waits_since() < NEVER
    guarded.rest()
    assert slot.waits_since() == NEVER


@pytest.mark.parametrize("make", [Guard, Unguarded])
def test_without_a_supervisor_a_guard_remembers_what_is_in_hand(make):
    guarded = make()
    guarded.take_in_hand((7, 1), (8, 1))
    assert guarded.in_hand() == [(7, 1), (8, 1)]
    guarded.take_in_hand((9, 2))
    guarded.rest()
    assert guarded.in_hand() == [(9, 2)]
    guarded.put_down()
    assert guarded.in_hand() == []


def test_unguarded_calls_set_no_alarm_and_note_no_deadline():
    slot = Slot(0)
    guarded = Unguarded(slot)
    guarded.take_in_hand((7, 1))
    guarded.start(PATIENCE)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert (slot.in_hand(), slot.due()) == ([(7, 1)], NEVER)
    guarded.stop()


def test_the_worker_knows_whether_its_calls_are_interrupted():
    assert Guard().interrupts
    assert not Unguarded().interrupts
