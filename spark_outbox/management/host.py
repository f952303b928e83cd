"""Whether units of systemd can work with a project's paths and user."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from spark_outbox.management.kits import Project

HIDDEN = ("/home", "/root", "/run/user")
"""The folders that ProtectHome=yes hides."""


def problems(project: Project) -> Iterator[str]:
    """Yield what systemd would refuse or hide. The paths need not be there yet; links are followed."""
    for option, path in (("--folder", project.folder), ("--python", project.python)):
        if not re.fullmatch(r"/[^\s\x00-\x1f%$'\"\\]*", path):
            yield (
                f"{option} {path!r}: units need an absolute path, without spaces, quotes, backslashes, "
                "% and $. Give one that will do, such as a symbolic link to it."
            )
        elif project.protect_home == "yes" and (place := _hidden(path)):
            way_out = (
                "Install Python elsewhere, such as /opt, and make the virtual environment with that"
                if option == "--python"
                else "Move the project elsewhere, such as /srv"
            )
            yield (
                f"{option} {path} is at {place}, which ProtectHome=yes hides from the units. {way_out}; "
                "or let the units read home folders: --protect-home=read-only"
            )
    if not re.fullmatch("[a-z_][a-z0-9_-]{0,30}", project.user):
        yield (
            f"{project.user!r} can't be a system user. Give another --user: a-z, 0-9, hyphens and "
            "underscores, up to 31."
        )


def _hidden(path: str) -> str | None:
    """Return where a path leads, or what it is, if that is hidden."""
    places = (os.path.normpath(path), os.path.realpath(path))
    return next((each for each in places if any(map(Path(each).is_relative_to, HIDDEN))), None)
