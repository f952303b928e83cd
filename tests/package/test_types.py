"""mypy and pyright, in a project that uses the wheel, accept what is right and find each mistake."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

from tests.postgres import ROOT

CONSUMER = ROOT / "tests" / "package" / "consumer"


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Return the interpreter of an environment that has the wheel, and all that this one has but its
    editable installs."""
    folder = tmp_path_factory.mktemp("environment")
    options = ["--quiet", "--no-periodic-update", "--no-seed", "--python", sys.executable]
    subprocess.run([sys.executable, "-m", "virtualenv", *options, folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


@pytest.fixture
def run(environment, tmp_path):
    """Return a function that runs a type checker in a copy of the project, and returns its report."""
    project = shutil.copytree(CONSUMER, tmp_path / "consumer")
    dropped = ("DJANGO", "MYPY", "PYTHON")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}

    def run(*command):
        done = subprocess.run(
            [environment, "-m", *command],
            cwd=project,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stdout + done.stderr  # it has found errors, and has no own
        return done.stdout

    return run


def mypy(run):
    for line in run("mypy", "--output", "json").splitlines():
        error = json.loads(line)
        if error["severity"] == "error":
            yield error["file"], error["line"], error["code"]


def pyright(run):
    for error in json.loads(run("pyright", "--outputjson"))["generalDiagnostics"]:
        yield error["file"], error["range"]["start"]["line"] + 1, error["rule"]


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_type_checker_accepts_what_is_right_and_finds_each_mistake(checker, run):
    found = defaultdict(set)
    for file, line, error in checker(run):
        assert Path(file).name == "wrong.py", (file, line, error)
        found[line].add(error)
    lines = (CONSUMER / "shop" / "wrong.py").read_text().splitlines()
    expected = {
        number: set(line.partition("# error: ")[2].split(", "))
        for number, line in enumerate(lines, 1)
        if "# error: " in line
    }
    assert len(expected) > 40
    assert set(found) == set(expected)
    for line, errors in found.items():
        assert errors & expected[line], line  # it may have more to say of the same mistake
