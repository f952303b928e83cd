"""The rules of circuit breakers, without a worker: what opens one, and what closes it again."""

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_outbox.worker.breaker import LONGEST_PAUSE, Breakers
from tests.tools import Clock

TURNS = NEW, UNTRIED, RETRY = "new", "untried", "retry"


def opened(threshold=3):
    clock = Clock()
    breakers = Breakers(threshold, clock)
    for event in range(threshold):
        breakers.failed("h", -event, NEW)
    return breakers, clock


def test_a_circuit_opens_after_first_attempts_that_fail_in_a_row_on_different_events():
    breakers = Breakers(3, Clock())
    assert not breakers.any
    assert [breakers.failed("h", event, NEW) for event in (1, 1, 1, 2)] == [0, 0, 0, 0]
    assert breakers.any
    assert breakers.remaining("h", 3, NEW) == 0
    assert breakers.failed("h", 3, UNTRIED) == 5
    assert breakers.remaining("h", 4, UNTRIED) == 5
    assert breakers.remaining("h", 4, RETRY) == 5
    assert breakers.remaining("other", 4, UNTRIED) == 0
    assert [breakers.failed("h", event, UNTRIED) for event in range(4, 20)] == [0] * 16  # called before
    assert breakers.succeeded("h")
    assert not breakers.any
    assert [breakers.failed("h", event, NEW) for event in (1, 2)] == [0, 0]
    assert not breakers.succeeded("h")  # it was not open
    assert [breakers.failed("h", event, NEW) for event in (3, 4)] == [0, 0]
    assert [Breakers(None, Clock()).failed("h", event, NEW) for event in range(50)] == [0] * 50


def test_retries_that_fail_open_no_circuit_and_let_no_pause_grow():
    breakers = Breakers(3, Clock())
    assert [breakers.failed("h", event, RETRY) for event in range(50)] == [0] * 50
    assert not breakers.any
    breakers, clock = opened()
    for event in range(50):
        clock.now += 5
        assert breakers.remaining("h", event, RETRY) == 0
        assert breakers.remaining("h", 100, RETRY) == 5  # one a pause
        assert breakers.failed("h", event, RETRY) == 0
    assert breakers.remaining("h", 200, UNTRIED) == 0


def test_an_event_that_waits_is_the_probe_at_the_end_of_a_pause_that_grows():
    breakers, clock = opened()
    for pause in (10, 20, 40, 80, 160, 300, 300):
        clock.now += 300
        assert breakers.remaining("h", 20, UNTRIED) == 0
        assert breakers.remaining("h", 21, UNTRIED) == 5  # no other is
        assert breakers.failed("h", 20, UNTRIED) == pause
        assert breakers.remaining("h", 20, UNTRIED) == pause
    clock.now += 300
    assert breakers.remaining("h", 22, UNTRIED) == 0
    assert breakers.succeeded("h")
    assert breakers.remaining("h", 23, UNTRIED) == 0


def test_new_events_are_probes_sooner_whatever_became_of_those_that_wait():
    breakers, clock = opened()
    for event in range(4):  # the pause of those that wait has grown to 80 s
        clock.now += 300
        assert breakers.remaining("h", event, UNTRIED) == 0
        breakers.failed("h", event, UNTRIED)
    for event, pause in enumerate((1, 2, 4, 8)):
        assert breakers.remaining("h", event, NEW) == 0
        assert breakers.remaining("h", 100, NEW) > 0  # no other is
        assert breakers.failed("h", event, NEW) == 0
        clock.now += pause - 0.01
        assert breakers.remaining("h", 100, NEW) > 0
        clock.now += 0.01
    assert breakers.remaining("h", 100, UNTRIED) == 65


def test_new_events_go_on_while_those_that_waited_fail():
    breakers = Breakers(3, Clock())
    assert [breakers.failed("h", event, UNTRIED) for event in range(3)] == [0, 0, 5]
    assert [breakers.remaining("h", event, NEW) for event in range(10, 20)] == [0] * 10
    for event in (10, 11, 12):
        assert breakers.remaining("h", 99, NEW) == 0
        breakers.failed("h", event, NEW)
    assert breakers.remaining("h", 99, NEW) > 0


def test_a_probe_of_which_nothing_is_heard_does_not_keep_the_circuit_open():
    breakers, clock = opened()
    clock.now += 5
    for turn in (UNTRIED, RETRY, NEW):
        assert breakers.remaining("h", 20, turn) == 0
        assert breakers.remaining("h", 21, turn) > 0
    clock.now += 5
    for turn in (UNTRIED, RETRY, NEW):
        assert breakers.remaining("h", 21, turn) == 0


def test_what_is_made_ready_by_hand_is_called_at_once_but_not_all_of_it():
    breakers, clock = opened()
    for turn in (UNTRIED, RETRY):
        assert breakers.remaining("h", 20, turn, by_hand=True) == 0
        assert breakers.failed("h", 20, turn) == 0
        assert breakers.remaining("h", 21, turn, by_hand=True) > 0
        clock.now += 1
    assert breakers.remaining("h", 22, UNTRIED) == 3  # no pause has grown
    assert breakers.remaining("h", 22, UNTRIED, by_hand=True) == 0
    assert breakers.succeeded("h")


@given(
    st.lists(
        st.tuples(
            st.integers(1, 30),
            st.sampled_from(TURNS),
            st.booleans(),
            st.sampled_from(["fail", "fail", "fail", "fail", "vanish", "succeed"]),
            st.sampled_from([0, 0, 0, 0.3, 4, 100]),
        )
    )
)
def test_whatever_happens_nobody_waits_for_ever_and_a_success_ends_all_waiting(calls):
    clock = Clock()
    breakers = Breakers(3, clock)
    for event, turn, by_hand, outcome, seconds in calls:
        clock.now += seconds
        wait = breakers.remaining("h", event, turn, by_hand=by_hand)
        assert 0 <= wait <= LONGEST_PAUSE
        if not wait and outcome == "fail":
            assert 0 <= breakers.failed("h", event, turn) <= LONGEST_PAUSE
        elif not wait and outcome == "succeed":
            breakers.succeeded("h")
            assert not breakers.any
            assert [breakers.remaining("h", 99, each) for each in TURNS] == [0, 0, 0]
    clock.now += LONGEST_PAUSE
    assert [breakers.remaining("h", 99, each) for each in TURNS] == [0, 0, 0]


def outage(*, seconds, emitted_over):
    """Play 10,000 events and a handler that is dead for so many seconds; return how many calls failed,
    and how long after the end of the outage the last event was done."""
    clock, chance = Clock(), random.Random(1)
    breakers = Breakers(10, clock)
    due = [(emitted_over * number / 10_000, number, NEW) for number in range(10_000)]
    failed = 0
    while due:
        moment, event, turn = heapq.heappop(due)
        clock.now = max(clock.now, moment)
        wait = breakers.remaining("h", event, turn)
        if wait:
            pause = wait * chance.uniform(1, 1.5)
            heapq.heappush(due, (clock.now + pause, event, RETRY if turn == RETRY else UNTRIED))
        elif clock.now < seconds:
            failed += 1
            breakers.failed("h", event, turn)
            heapq.heappush(due, (clock.now + 1, event, RETRY))
        else:
            breakers.succeeded("h")
    return failed, clock.now - seconds


@pytest.mark.parametrize(
    ("seconds", "emitted_over", "most_calls", "soon"),
    [(60, 0, 16, 40), (60, 60, 22, 40), (3600, 0, 45, 300), (3600, 3600, 80, 300)],
)
def test_a_dead_mail_server_costs_few_attempts_and_is_soon_found_to_be_back(
    seconds, emitted_over, most_calls, soon
):
    failed, last = outage(seconds=seconds, emitted_over=emitted_over)
    assert failed <= most_calls
    assert last <= soon
