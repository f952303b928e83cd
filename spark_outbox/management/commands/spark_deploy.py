"""Print or write the files of deploy/ for this project; see management/kits.py."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS

from spark_outbox import conf
from spark_outbox.management import host
from spark_outbox.management.command import OutboxCommand
from spark_outbox.management.kits import KITS, Project

ON_HOST = ("systemd", "timers")
"""The kits that name the project's folder, interpreter and user."""

NAME = "[a-z]([a-z0-9-]{0,38}[a-z0-9])?"

GENERAL = {"app", "backend", "conf", "config", "core", "django", "project", "settings", "src"}
"""Names of settings' packages that many projects have: they tell no project from another."""


class Command(OutboxCommand):
    help = (
        "Prints the files to deploy a worker with, filled in for this project, or writes them into a "
        "folder; then says what to do with them. It connects to no database."
    )
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("kit", choices=KITS, metavar="KIT", help=", ".join(KITS))
        parser.add_argument(
            "--output", type=Path, metavar="DIR", help="write the files into this folder"
        )
        parser.add_argument("--force", action="store_true", help="overwrite files that are there")
        parser.add_argument(
            "--name",
            type=_name,
            help="the project's name, in lower-case letters, digits and hyphens (default: the settings' "
            "top package; if that is a general word, such as config, the folder's name)",
        )
        parser.add_argument("--user", help="who runs it, for systemd (default: the name)")
        parser.add_argument(
            "--folder",
            default=str(Path.cwd()),
            metavar="DIR",
            help="where manage.py is, for systemd (default: %(default)s)",
        )
        parser.add_argument(
            "--python",
            default=sys.executable,
            metavar="PATH",
            help="the interpreter, for systemd (default: %(default)s)",
        )
        parser.add_argument(
            "--protect-home",
            choices=("yes", "read-only"),
            default="yes",
            help="whether the units of systemd see home folders (default: %(default)s, they don't)",
        )
        parser.add_argument(
            "--database",
            default=DEFAULT_DB_ALIAS,
            metavar="ALIAS",
            help="the database with the outbox (default: %(default)s)",
        )

    def handle(self, **options: Any) -> None:
        self.check_database(options["database"])
        settings = os.environ["DJANGO_SETTINGS_MODULE"]
        name = options["name"] or _default_name(settings, options["folder"])
        project = Project(
            name=name,
            user=options["user"] or name,
            folder=options["folder"],
            settings=settings,
            wsgi=_wsgi(settings),
            database=options["database"],
            python=options["python"],
            protect_home=options["protect_home"],
        )
        if options["kit"] in ON_HOST and (problems := list(host.problems(project))):
            raise CommandError("\n".join(problems))
        kit, output = KITS[options["kit"]], options["output"]
        texts = kit.texts(project)
        if output is None:
            self._print(texts)
        else:
            self._write(texts, output, force=options["force"])
        self.stderr.write(project.fill(kit.steps), style_func=str)

    def _print(self, texts: dict[str, str]) -> None:
        for name, text in texts.items():
            if len(texts) > 1:
                self.stdout.write(f"# ==> {name} <==")
            self.stdout.write(text)

    def _write(self, texts: dict[str, str], folder: Path, *, force: bool) -> None:
        there = [str(folder / name) for name in texts if (folder / name).exists()]
        if there and not force:
            raise CommandError(f"{', '.join(there)}: there already. Give --force to overwrite.")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
            self.stderr.write(f"{folder / name} is written.", style_func=str)


def _default_name(settings: str, folder: str) -> str:
    """Return a name that no other project on this host is likely to have."""
    for word in (settings.partition(".")[0], Path(folder).name):
        name = re.sub("[^a-z0-9]+", "-", word.lower()).strip("-")
        if name not in GENERAL and re.fullmatch(NAME, name):
            return name
    raise CommandError("Neither the settings nor the folder name the project: give --name.")


def _wsgi(settings: str) -> str:
    module, _, name = (conf.wsgi_application() or "").rpartition(".")
    if not module:
        return settings.partition(".")[0] + ".wsgi"
    return module if name == "application" else f"{module}:{name}"


def _name(text: str) -> str:
    if not re.fullmatch(NAME, text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: use a-z, 0-9 and hyphens, up to 40")
    return text
