"""The project that is hurt: its database by one of several roads, as the environment says."""

import os

from tests.postgres import django_database
from tests.settings import *  # noqa: F403

INSTALLED_APPS = ["django.contrib.contenttypes", "spark_outbox", "tests.chaos"]
# How a worker hears of events: by its own connection, by a direct one past a pooler, or not at all.
# Who LISTENs polls once an hour: a wake that is lost would be an event that is stuck.
_listen, _poll = {"own": ("", 3600), "direct": ("direct", 3600), "poll": (None, 0.5)}[
    os.environ.get("CHAOS_LISTEN", "own")
]
if _listen == "direct":
    DATABASES["direct"] = django_database(os.environ["CHAOS_DIRECT_URL"])  # noqa: F405
if os.environ.get("CHAOS_POOL"):  # psycopg's: a pool in the process itself
    DATABASES["default"]["OPTIONS"]["pool"] = True  # noqa: F405
SPARK_OUTBOX = {"LISTEN_DATABASE": _listen, "POLL_INTERVAL": _poll, "REQUIRE_ATOMIC": True}
