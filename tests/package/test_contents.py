"""The wheel and the sdist have what belongs there and nothing else, and the package index takes them."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import spark_outbox
from tests.postgres import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def files(*folders):
    """Return the files below these folders of the source tree."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Unpack the wheel; return the folder."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def about(installed):
    """Return the folder of the wheel's metadata."""
    return installed / f"spark_outbox-{spark_outbox.__version__}.dist-info"


def test_the_wheel_has_the_package_and_the_files_to_deploy_and_nothing_else(installed, about):
    there = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    package = {name for name in files("spark_outbox") if not name.endswith(".po")}
    deploy = {f"spark_outbox/{name}" for name in files("deploy") if "/screenshots/" not in name}
    assert {name for name in there if not name.startswith(about.name)} == package | deploy
    kinds = {(name.split("/")[1], name.rpartition(".")[2]) for name in there}
    assert kinds >= {
        ("deploy", "service"),
        ("locale", "mo"),
        ("migrations", "sql"),
        ("py.typed", "typed"),
        ("static", "css"),
        ("static", "js"),
        ("templates", "html"),
    }


def test_the_sdist_has_what_the_tests_need(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    top = {".gitignore", "LICENSE", "PKG-INFO", "README.md", "manage.py", "pyproject.toml"}
    assert there == top | files(".ci", "deploy", "spark_outbox", "tests")
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        collect,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_house.py::test_the_public_names_are_these" in done.stdout


def test_the_metadata_is_complete(about):
    metadata = email.message_from_string((about / "METADATA").read_text())
    assert (metadata["Name"], metadata["Version"]) == ("spark_outbox", spark_outbox.__version__)
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert (about / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    needed = [each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each]
    assert needed == PROJECT["dependencies"]
    entry_points = (about / "entry_points.txt").read_text().split("\n")
    for group, names in PROJECT["entry-points"].items():
        for name, value in names.items():
            assert f"{name} = {value}" in entry_points[entry_points.index(f"[{group}]") :]


def test_the_page_of_the_package_index_links_to_nothing_that_is_not_there(about):
    page = email.message_from_string((about / "METADATA").read_text()).get_payload()
    assert page.startswith("# spark_outbox")
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert "How it works (`spark_outbox/README.md`)" in page


def test_the_package_index_takes_them(wheel, sdist):
    check = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2
