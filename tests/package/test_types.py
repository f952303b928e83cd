"""mypy and pyright, outside of the source tree: they accept what is right in a small project that uses the
wheel, and find each mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

from tests.postgres import ROOT

CONSUMER = ROOT / "tests" / "package" / "consumer"

Found = dict[str, dict[int, set[str]]]
"""The names of errors, by line and by file."""


@pytest.fixture(scope="module")
def project(wheel, tmp_path_factory):
    """Return a copy of the project, beside the unpacked wheel."""
    folder = tmp_path_factory.mktemp("types")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return shutil.copytree(CONSUMER, folder / "consumer")


def run(project, *command):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DJANGO", "MYPY"))}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=project,
        env={**environment, "PYTHONPATH": str(project.parent / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    return done.stdout


def mypy(project):
    found = defaultdict(lambda: defaultdict(set))
    for line in run(project, "mypy", "--output", "json").splitlines():
        error = json.loads(line)
        if error["severity"] == "error":
            found[Path(error["file"]).name][error["line"]].add(error["code"])
    return found


def pyright(project):
    found = defaultdict(lambda: defaultdict(set))
    report = json.loads(run(project, "pyright", "--pythonpath", sys.executable, "--outputjson"))
    for error in report["generalDiagnostics"]:
        found[Path(error["file"]).name][error["range"]["start"]["line"] + 1].add(error["rule"])
    return found


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_type_checker_accepts_what_is_right_and_finds_each_mistake(checker, project):
    found = checker(project)
    assert set(found) == {"wrong.py"}
    lines = (CONSUMER / "shop" / "wrong.py").read_text().splitlines()
    expected = {
        number: set(re.split(", ?", line.partition("# error: ")[2]))
        for number, line in enumerate(lines, 1)
        if "# error: " in line
    }
    assert len(expected) > 40
    assert set(found["wrong.py"]) == set(expected)
    for line, errors in found["wrong.py"].items():
        assert errors & expected[line], line  # it may have more to say of the same mistake
