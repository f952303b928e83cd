"""The demo project, for a worker that gives up a reload soon."""

import os

from spark_outbox.processes import reload
from tests.settings import *  # noqa: F403

reload.CHECK_PATIENCE = float(os.environ["CHECK_PATIENCE"])
