"""For the tests of projects that use spark_outbox. Everything works inside TestCase's transaction.

Outbox has all of it in one object, which is also pytest's fixture `outbox`.
"""

from spark_outbox.testing.draining import drain
from spark_outbox.testing.events import EmittedEvent, capture_events, emitted
from spark_outbox.testing.outbox import Outbox
from spark_outbox.testing.strictness import strict

__all__ = ["EmittedEvent", "Outbox", "capture_events", "drain", "emitted", "strict"]
