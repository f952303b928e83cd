"""The base of the commands: an error is one sentence; EX_CONFIG means that a restart can't help."""

import argparse
import os
from typing import Any

from django.core.management.base import BaseCommand, CommandError, SystemCheckError
from django.db import connections

from spark_outbox import conf
from spark_outbox.errors import SettingsError, SparkOutboxError


class OutboxCommand(BaseCommand):
    """A command on an outbox. Errors of the configuration exit with EX_CONFIG."""

    def check(self, *arguments: Any, **options: Any) -> None:
        try:
            super().check(*arguments, **options)
        except SystemCheckError as error:
            error.returncode = os.EX_CONFIG
            raise

    def execute(self, *arguments: Any, **options: Any) -> str | None:
        try:
            return super().execute(*arguments, **options)
        except SparkOutboxError as error:
            raise CommandError(str(error), returncode=os.EX_CONFIG) from error

    def settings(self) -> conf.Settings:
        """Return the settings, for the options' defaults. If they are invalid, `execute` reports it."""
        try:
            return conf.current()
        except SettingsError:
            return conf.Settings()

    def check_database(self, alias: str) -> None:
        """Raise CommandError if the database can't hold an outbox."""
        if alias not in connections:
            known = ", ".join(connections)
            raise CommandError(f"DATABASES has no {alias!r}; it has {known}.", returncode=os.EX_CONFIG)
        vendor = connections[alias].vendor
        if vendor != "postgresql":
            suitable = [other for other in connections if connections[other].vendor == "postgresql"]
            raise CommandError(
                f"Database {alias!r} is {vendor}, and an outbox needs PostgreSQL. Choose another with "
                f"--database: {', '.join(suitable) or 'but DATABASES has none'}.",
                returncode=os.EX_CONFIG,
            )


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10**8:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value
