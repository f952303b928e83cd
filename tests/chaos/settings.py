"""The project under test. The environment chooses the route to its database."""

import os

from tests.postgres import django_database
from tests.settings import *  # noqa: F403

INSTALLED_APPS = ["django.contrib.contenttypes", "spark_outbox", "tests.chaos"]
ROOT_URLCONF = ""  # no admin
# A worker LISTENs on its own connection, on a direct one past a pooler, or not at all. If it LISTENs, it
# polls once an hour, so that a lost wake shows as a stuck event.
_listen, _poll = {"own": ("", 3600), "direct": ("direct", 3600), "poll": (None, 0.5)}[
    os.environ.get("CHAOS_LISTEN", "own")
]
if _listen == "direct":
    DATABASES["direct"] = django_database(os.environ["CHAOS_DIRECT_URL"])  # noqa: F405
if os.environ.get("CHAOS_POOL"):  # psycopg's: a pool in the process itself
    DATABASES["default"]["OPTIONS"]["pool"] = True  # noqa: F405
SPARK_OUTBOX = {"LISTEN_DATABASE": _listen, "POLL_INTERVAL": _poll, "REQUIRE_ATOMIC": True}
