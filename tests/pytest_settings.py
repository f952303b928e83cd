"""The demo project's settings, on the server that `tests.postgres` chooses for tests."""

import os

from tests import postgres

_server = postgres.for_tests()
os.environ["DATABASE_URL"] = _server.url
os.environ["EXTRA_APPS"] = "tests.probe"

from tests.settings import *  # noqa: E402, F403

SERVER = _server
# The same database by another connection, with parameters bound by the server.
DATABASES["other"] = {  # noqa: F405
    **DATABASES["default"],  # noqa: F405
    "OPTIONS": {**DATABASES["default"]["OPTIONS"], "server_side_binding": True},  # noqa: F405
    "TEST": {"MIRROR": "default"},
}
MIDDLEWARE += ["tests.dashboard.csp.policy"]  # noqa: F405
