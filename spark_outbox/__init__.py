"""A transactional outbox for Django on PostgreSQL.

Nothing here needs the app registry: import these names at any time.
"""

from spark_outbox.emitting.emit import aemit, aemit_many, emit, emit_many
from spark_outbox.errors import BatchFailed, Discard, Retry
from spark_outbox.events.event import Event
from spark_outbox.registry.handlers import handler, source

__version__ = "0.1.0"

__all__ = [
    "BatchFailed",
    "Discard",
    "Event",
    "Retry",
    "aemit",
    "aemit_many",
    "emit",
    "emit_many",
    "handler",
    "source",
]
