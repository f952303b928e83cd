"""Strict mode: an event that no handler matches is an error, since its group may have a typo."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from spark_outbox.observing import hooks
from spark_outbox.registry.handlers import registry


class Watch:
    """Notes what this process emits, also what is rolled back, from `start` until `stop`."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}  # the first of each group

    def start(self) -> None:
        hooks.event_emitted.connect(self._note)

    def stop(self) -> None:
        hooks.event_emitted.disconnect(self._note)

    def _note(self, *, group: str, key: str, **_: object) -> None:
        self._keys.setdefault(group, key)

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Raise AssertionError after the block if no handler matches one of the groups. If the block
        raises, that may be why: then its exception has a note."""
        try:
            yield
        except BaseException as error:  # as those of pytest.fail() are
            if complaints := self._complaints():
                error.add_note(complaints)
            raise
        if complaints := self._complaints():
            raise AssertionError(complaints)

    def _complaints(self) -> str:
        unmatched = [group for group in self._keys if not registry.handlers_for(group)]
        return "\n".join(self._complaint(group) for group in unmatched)

    def _complaint(self, group: str) -> str:
        patterns = sorted({handler.pattern.pattern for handler in registry.handlers})
        close = difflib.get_close_matches(group, patterns, n=3, cutoff=0.5)
        hint = f"Close are {', '.join(map(repr, close))}." if close else "No pattern is close."
        return f"No handler matches the group {group!r} of the event {self._keys[group]!r}. {hint}"


@contextmanager
def strict() -> Iterator[None]:
    """Raise AssertionError at the end of the block if an event was emitted that no handler matches."""
    watch = Watch()
    watch.start()
    try:
        with watch.judging():
            yield
    finally:
        watch.stop()
