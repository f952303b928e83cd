"""The crash prover: a handler comes to the same end wherever its process dies.

Each run calls the handler, cuts it off at one boundary, and calls it again, as the next worker does. It
is compared with a run that nothing has disturbed, and taken back.
"""

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from django.core import mail
from django.core.mail import EmailMessage
from django.db import connections, transaction

from spark_outbox.emitting.emit import events_committed
from spark_outbox.events.event import Event
from spark_outbox.registry.handlers import Handler
from spark_outbox.store import testing
from spark_outbox.testing.autocommit import autocommitting
from spark_outbox.testing.boundaries import Boundaries, Cut
from spark_outbox.testing.calling import argument, run, shared
from spark_outbox.testing.states import Rows, States

MOST_SHOWN = 10
"""How many boundaries the report of a failed proof lists, and differences of each."""

LONGEST = 500
"""How many characters of a difference it shows."""

END = "at its end, before its event is marked as done"

Calls = list[Any]
"""Calls to others, as a test records them: mails, requests, the `mock_calls` of a mock."""


@dataclass(slots=True)
class End:
    """The end of one run."""

    where: str = ""
    """The boundary at which it was cut off."""
    error: str = ""
    """What the second call raised."""
    after: dict[str, Rows] = field(default_factory=dict)
    rows: "Counter[str]" = field(default_factory=Counter)
    calls: "Counter[str]" = field(default_factory=Counter)

    def differences(self, other: "End") -> list[str]:
        lines = [f"the second call raised {self.error}"] if self.error else []
        for what, here, there in (
            ("row", self.rows, other.rows),
            ("call", self.calls, other.calls),
        ):
            lines += [f"one {what} more: {each}" for each in (here - there).elements()]
            lines += [f"one {what} less: {each}" for each in (there - here).elements()]
        return lines


class Proof:
    """Runs of one handler with one event."""

    def __init__(
        self,
        handler: Handler,
        event: Event,
        *,
        calls: Sequence[Calls],
        repeats: bool,
        ignored: Collection[str],
        using: str,
    ) -> None:
        self._handler = handler
        self._event = event
        mails: Sequence[Calls] = [mail.outbox] if hasattr(mail, "outbox") else []
        self._recorded = [*mails, *calls]
        self._repeats = repeats
        self._using = using
        self._states = States(ignored, using=using)
        self._lengths: list[int] = []  # of what is recorded, at the cut

    def run(self, cut: int | None) -> End:
        """Run to the end; with `cut`, in two calls, unless that boundary comes after the commit."""
        end = End()
        with self._forgotten() as lengths, undone(self._using) as sequences:
            boundaries = Boundaries(cut, self._note_calls)
            is_done = self._call(boundaries, attempt=1)
            end.where = boundaries.where
            if not is_done:
                self._truncate(self._lengths)  # what was called after the death was not
                if not self._handler.kind.outlives:
                    testing.restart(sequences, using=self._using)  # all is rolled back, but these
                end.error = self._call_again()
            end.after = self._states.read()
            new = [
                as_text(call)
                for each, length in zip(self._recorded, lengths, strict=True)
                for call in each[length:]
            ]
        end.rows = self._states.changes(end.after)
        end.calls = Counter(set(new) if self._repeats else new)
        return end

    @contextmanager
    def _forgotten(self) -> Iterator[list[int]]:
        """Forget the calls to others that the block makes."""
        lengths = [len(each) for each in self._recorded]
        try:
            yield lengths
        finally:
            self._truncate(lengths)

    def _note_calls(self) -> None:
        self._lengths = [len(each) for each in self._recorded]

    def _truncate(self, lengths: Sequence[int]) -> None:
        for each, length in zip(self._recorded, lengths, strict=True):
            del each[length:]

    def _call(self, boundaries: Boundaries, *, attempt: int) -> bool:
        """Call the handler; return whether its event was marked as done."""
        handler, connection = self._handler, connections[self._using]
        given = argument(handler, self._event, attempt=attempt)
        is_done = False
        try:
            if handler.kind.outlives:
                with boundaries.watched(connection), autocommitting(connection, boundaries):
                    run(handler, given)
                boundaries.reach(END)
                return True
            first = len(connection.run_on_commit)
            with shared(handler, using=self._using):
                with boundaries.watched(connection):
                    run(handler, given)
                boundaries.reach(END)
            is_done = True
            boundaries.reach("after the commit")
            waiting: list[Any] = connection.run_on_commit
            callbacks = [(callback, robust) for _, callback, robust in waiting[first:]]
            del waiting[first:]
            with boundaries.watched(connection), autocommitting(connection, boundaries):
                for callback, robust in callbacks:
                    with suppress(Exception) if robust else nullcontext():
                        callback()
        except (Cut, Exception, BaseExceptionGroup):  # a TaskGroup makes a group of what is cut off
            if not boundaries.where:
                raise
        return is_done

    def _call_again(self) -> str:
        """Call the handler once more; return what it raised."""
        try:
            self._call(Boundaries(None, self._note_calls), attempt=2)
        except Exception as error:  # noqa: BLE001, it is what the proof reports
            return repr(error)
        return ""


def prove(proof: Proof, name: str, *, most: int) -> list[str]:
    """Cut the handler off everywhere; return the boundaries. Raises AssertionError if the end differs
    anywhere, or if there are more than `most` boundaries."""
    boundaries: list[str] = []
    failures: list[str] = []
    expected = proof.run(None)
    if lines := proof.run(None).differences(expected):
        never = f"{name} never comes to the same end, even if nothing disturbs it:"
        raise AssertionError(indented(never, lines))
    while len(boundaries) <= most:
        end = proof.run(len(boundaries) + 1)
        if not end.where:
            break
        boundaries.append(end.where)
        if lines := end.differences(expected):
            failures.append(indented(f"  {len(boundaries)}. {end.where}:", lines))
    else:
        raise AssertionError(f"{name} has more than {most} boundaries. Give most=…, or a smaller event.")
    if failures:
        left = len(failures) - MOST_SHOWN
        first = (
            f"{name} comes to another end if it is cut off at {len(failures)} of {len(boundaries)} "
            "boundaries, and called again:"
        )
        more = [f"  … and {left} others"] if left > 0 else []
        raise AssertionError("\n".join([first, *failures[:MOST_SHOWN], *more]))
    return boundaries


def indented(title: str, lines: Sequence[str]) -> str:
    shown = [f"{line[:LONGEST]}…" if len(line) > LONGEST else line for line in lines[:MOST_SHOWN]]
    left = len(lines) - MOST_SHOWN
    return "\n    ".join([title, *shown, *([f"… and {left} others"] if left > 0 else [])])


@contextmanager
def undone(using: str) -> Iterator[str]:
    """Take back everything that the block writes, also in durable transactions. Events that it emits are
    left to a worker, also with DISPATCH = "on_commit". Yields where sequences were."""
    receivers = events_committed.receivers
    connections[using].ensure_connection()
    sequences = testing.sequences(using=using)
    try:
        with transaction.atomic(using=using), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # whoever dies closes nothing
            outermost: Any = connections[using].atomic_blocks[-1]
            outermost._from_testcase = True
            testing.touch(using=using)
            events_committed.receivers = []
            try:
                yield sequences
            finally:
                transaction.set_rollback(True, using=using)
    finally:
        events_committed.receivers = receivers
        testing.restart(sequences, using=using)


def as_text(call: Any) -> str:
    """Return a recorded call in a form in which two can be compared."""
    if isinstance(call, EmailMessage):
        parts = (call.subject, call.body, call.from_email, call.recipients(), call.extra_headers)
        bodies = [tuple(each) for each in getattr(call, "alternatives", [])]
        return f"mail {parts!r}, {bodies or 'no'} alternatives, {len(call.attachments)} attachments"
    way_to_show: object = type(call).__repr__
    if way_to_show is object.__repr__:  # it would show an address
        return f"{type(call).__qualname__} {vars(call)!r}"
    return repr(call)
