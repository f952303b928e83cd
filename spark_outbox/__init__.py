"""A transactional outbox for Django on PostgreSQL.

Nothing here needs the app registry: import these names at any time. Django is imported with the first of
them, so pytest can load our plugin before coverage begins to measure. (PYTEST_DONT_REWRITE: there is no
assertion here to rewrite, and a program that calls pytest may have imported this before.)
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

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

if TYPE_CHECKING:
    from spark_outbox.emitting.asynchronous import aemit, aemit_many
    from spark_outbox.emitting.emit import emit, emit_many
    from spark_outbox.errors import BatchFailed, Discard, Retry
    from spark_outbox.events.event import Event
    from spark_outbox.registry.decorators import handler, source
else:
    HOMES = ("errors", "events.event", "registry.decorators", "emitting.emit", "emitting.asynchronous")

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        for home in HOMES:
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                break
        globals()[name] = found = getattr(module, name)
        return found
