"""The base of the commands: an error is one sentence; EX_CONFIG means that a restart can't help."""

import os
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError, SystemCheckError
from django.db import DEFAULT_DB_ALIAS, OperationalError, ProgrammingError, connections
from psycopg.errors import UndefinedFunction, UndefinedTable

from spark_outbox import conf
from spark_outbox.errors import NotMigrated, SettingsError, SparkOutboxError, describe
from spark_outbox.worker.session import check_outbox


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
        except ProgrammingError as error:  # a table, view or function is not there: are all?
            self._check_outbox(options["database"] or DEFAULT_DB_ALIAS, error)
            raise
        except OperationalError as error:
            alias = options["database"] or DEFAULT_DB_ALIAS
            if connections[alias].connection is not None:
                raise
            raise CommandError(f"Database {alias!r} can't be used: {describe(error)}") from error

    def _check_outbox(self, alias: str, error: ProgrammingError) -> None:
        """Raise CommandError if the error is that the database has no outbox."""
        if isinstance(error.__cause__, UndefinedTable | UndefinedFunction):
            try:
                check_outbox(None, using=alias)
            except NotMigrated as missing:
                raise CommandError(str(missing), returncode=os.EX_CONFIG) from error

    def settings(self) -> conf.Settings:
        """Return the settings, for the options' defaults. If they are invalid, `execute` reports it."""
        try:
            return conf.current()
        except SettingsError:
            return conf.Settings()

    def confirm(self, question: str, *, yes: bool, instead: str = "--dry-run") -> None:
        """Ask on a terminal, unless the answer is given already. Raises CommandError if it is no, or
        there is no terminal; it names the option `instead`."""
        if yes:
            return
        if not sys.stdin.isatty():
            raise CommandError(f"There is no terminal to ask on: give --yes, or {instead}.")
        self.stderr.write(f"{question} [y/N] ", ending="", style_func=str)
        self.stderr.flush()
        if input().strip().lower() not in {"y", "yes"}:
            raise CommandError("Nothing was changed.")

    def show_progress(self, text: str) -> None:
        """Replace the last line of a terminal."""
        if self.stderr.isatty():
            self.stderr.write(f"\r\x1b[K{text}", ending="", style_func=str)
            self.stderr.flush()

    def check_database(self, alias: str) -> None:
        """Raise CommandError if the database can't hold an outbox."""
        if alias not in connections:
            known = ", ".join(connections)
            raise CommandError(f"DATABASES has no {alias!r}; it has {known}.", returncode=os.EX_CONFIG)
        vendor = connections[alias].vendor
        if vendor != "postgresql":
            suitable = [other for other in connections if connections[other].vendor == "postgresql"]
            way_out = (
                f"Choose another with --database: {', '.join(suitable)}."
                if suitable
                else "DATABASES has none."
            )
            raise CommandError(
                f"Database {alias!r} is {vendor}, and an outbox needs PostgreSQL. {way_out}",
                returncode=os.EX_CONFIG,
            )
