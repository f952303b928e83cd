"""A small project named shop, for tests that deploy one."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from spark_outbox.management.kits import Project
from tests.postgres import ROOT

SHOP = Project(
    name="shop",
    user="shop",
    folder="/srv/shop",
    settings="shop.settings",
    wsgi="shop.wsgi",
    database="default",
    python="/srv/shop/venv/bin/python",
)

FILES = {
    "manage.py": "from django.core.management import execute_from_command_line\n"
    "import sys\n"
    "execute_from_command_line(sys.argv)\n",
    "shop/__init__.py": "",
}


def build_wheel(folder: Path) -> None:
    """Put a wheel of this checkout into a folder."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write files, by their paths within a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
