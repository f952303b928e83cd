"""`spark_worker --metrics-port`: what its processes count, and the state of the outbox, at once."""

import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from spark_outbox.errors import SettingsError
from spark_outbox.processes.serving import Page, Server
from spark_outbox.worker import bounds

logger = logging.getLogger(__name__)

VARIABLE = "SPARK_OUTBOX_METRICS"
"""The environment variable by which a supervisor that becomes a new program, see processes/reload.py,
finds what was counted so far. It names the process, as others inherit it, too."""


class Metrics:
    """The metrics of one supervisor. Raises SettingsError without the extra, or if the port is taken."""

    def __init__(self, address: tuple[str, int], *, using: str) -> None:
        try:
            from spark_outbox.observing import database, files, prometheus
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("prometheus_client"):
                raise
            raise SettingsError(
                '--metrics-port needs prometheus_client: pip install "spark_outbox[prometheus]"'
            ) from None
        self._prometheus, self._files = prometheus, files
        self._using = using
        self._database = database.Database(using)
        self.server = Server(
            "spark_metrics", "--metrics-port", address, {"/metrics": self._page}, on_end=self.remove
        )
        self._generation, self._folder = _inherit()
        os.environ[VARIABLE] = f"{os.getpid()} {self._generation + 1} {self._folder}"

    def count(self, number: int) -> None:
        """In a new worker process, of this place: count from now on; nothing, if the disk is full.

        During a reload, a place has a process of the former program beside that of the new one.
        """
        try:
            self._prometheus.count_in(self._folder, f"{number}{'ab'[self._generation % 2]}")
        except OSError as error:
            self._prometheus.stop()
            details: dict[str, object] = {"folder": str(self._folder), "error": error.strerror}
            logger.warning(
                "This process counts nothing for metrics: %(folder)s can't be written to (%(error)s).",
                details,
                extra=details,
            )

    def remove(self) -> None:
        """Forget what was counted."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _page(self) -> Page:
        """Answer a scrape, in the process of the server."""
        bounds.set_bounds(self._using)
        bounds.leave_pools(self._using)
        counted = self._files.InFiles(self._folder)
        return Page(self._prometheus.scrape(counted, self._database), kind=self._prometheus.CONTENT_TYPE)


def _inherit() -> tuple[int, Path]:
    """Return the number of programs that this supervisor was before, and the folder of its metrics."""
    with contextlib.suppress(ValueError):
        pid, generation, folder = os.environ.pop(VARIABLE, "").split(" ", 2)
        if int(pid) == os.getpid() and Path(folder).is_dir():
            return int(generation), Path(folder)
    return 0, Path(tempfile.mkdtemp(prefix="spark_metrics_"))
