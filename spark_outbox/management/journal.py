"""The worker's log where the project's LOGGING has no say: to people, or to systemd's journal."""

import logging
import os
import sys
from typing import Any

PRIORITIES = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}
"""The levels of syslog(3)."""


def set_up_logging(verbosity: int) -> None:
    """Show our own log with -v 2 or more; and to the journal in any case, warnings at least. Not if the
    project's LOGGING does so already."""
    logger = logging.getLogger("spark_outbox")
    to_journal = is_journal()
    if logger.hasHandlers() if to_journal else (verbosity < 2 or logger.handlers):
        return
    handler: logging.Handler
    if to_journal:
        handler = _journal_handler()
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(
            {0: logging.WARNING, 1: logging.WARNING, 2: logging.INFO}.get(verbosity, logging.DEBUG)
        )


def is_journal() -> bool:
    """Return whether stderr goes to the journal, as systemd says."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _journal_handler() -> logging.Handler:
    try:
        from systemd import journal
    except ImportError:
        handler = logging.StreamHandler()
        handler.setFormatter(PriorityFormatter())
        return handler
    return JournalHandler(journal.send)


class PriorityFormatter(logging.Formatter):
    """Begins each line with its priority, as sd-daemon(3) says."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{priority(record)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


class JournalHandler(logging.Handler):
    """Writes to the journal, with what the record is about as fields: SPARK_OUTBOX_HANDLER,
    SPARK_OUTBOX_EVENT_ID and so on. `send` is that of python-systemd."""

    def __init__(self, send: Any) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        details = record.args if isinstance(record.args, dict) else {}
        fields = {f"SPARK_OUTBOX_{name.upper()}": str(value) for name, value in details.items()}
        try:
            self._send(
                self.format(record),
                PRIORITY=str(priority(record)),
                LOGGER=record.name,
                SYSLOG_IDENTIFIER="spark-worker",
                **fields,
            )
        except Exception:  # noqa: BLE001, as each handler of logging
            self.handleError(record)


def priority(record: logging.LogRecord) -> int:
    return next((found for level, found in PRIORITIES.items() if record.levelno >= level), 7)
