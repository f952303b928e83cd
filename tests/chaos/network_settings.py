"""The demo project, with a direct connection and SPARK_OUTBOX (as JSON) from the environment."""

import json
import os

from tests import postgres
from tests.settings import *  # noqa: F403

SPARK_OUTBOX = json.loads(os.environ.get("SPARK_OUTBOX", "{}"))
if os.environ.get("DIRECT_URL"):
    DATABASES["direct"] = postgres.django_database(os.environ["DIRECT_URL"])  # noqa: F405
