"""The demo project with three settings that are wrong, and a second database that can have no outbox."""

import os

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES

DATABASES["lite"] = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
if "WRONG" in os.environ:
    SPARK_OUTBOX = {"BATCH_SIZE": 0, "WAKE": "sometimes", "BACKOF": 1}
