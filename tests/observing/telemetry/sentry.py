"""The demo project with Sentry, whose transport appends everything to a file."""

import json
import os
from pathlib import Path

import sentry_sdk
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from spark_outbox.observing.sentry import SparkOutboxIntegration
from tests.settings import *  # noqa: F403

INSTALLED_APPS += ["tests.observing.telemetry"]  # noqa: F405


class _Local(Transport):
    def capture_envelope(self, envelope: Envelope) -> None:
        with Path(os.environ["TELEMETRY"], f"{os.getpid()}.json").open("a") as file:
            for item in envelope.items:
                if item.payload.json is not None:
                    file.write(json.dumps([item.type, item.payload.json]) + "\n")


options = {"traces_sample_rate": 1.0, **json.loads(os.environ.get("SENTRY_OPTIONS", "{}"))}
sentry_sdk.init(
    dsn="https://key@localhost/1",
    transport=_Local,
    integrations=[SparkOutboxIntegration(retries=not os.environ.get("FINAL_ONLY"))],
    **options,
)
