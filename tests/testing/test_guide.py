"""The guide's examples run in a project of their own, where pytest finds the plugin by itself, beside
pytest-django, pytest-cov and pytest-xdist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.db import connection

from tests.postgres import ROOT

GUIDE = (ROOT / "spark_outbox" / "testing" / "README.md").read_text()
FILES = re.findall(r"^```python (\S+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)

SETTINGS = """
SECRET_KEY = "test"
INSTALLED_APPS = ["spark_outbox", "orders"]
USE_TZ = True
MAILERS = {{"default": {{"BACKEND": "django.core.mail.backends.locmem.EmailBackend"}}}}  # Django 6.1
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {{"default": {database!r}}}
"""

STRICT = """
import pytest
from spark_outbox import emit


def test_a_typo(db):
    emit("order_piad")


def test_a_typo_that_has_consequences(outbox):
    emit("order_piad")
    assert outbox.drain() == 2


@pytest.mark.outbox(strict=False)
def test_no_typo(outbox):
    emit("order_piad")
    outbox.assert_emitted("order_piad")


class TestOfAClass:
    @pytest.fixture
    def emitted(self, outbox):
        emit("order_piad")

    def test_a_typo_in_a_fixture(self, emitted):
        pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, code in [*FILES, ("orders/__init__.py", ""), ("tests/__init__.py", "")]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(f"{code}\n\n")
    server = {key: connection.settings_dict[key] for key in ("USER", "PASSWORD", "HOST", "PORT")}
    database = {"ENGINE": connection.settings_dict["ENGINE"], "NAME": "guide", **server}
    (tmp_path / "settings.py").write_text(SETTINGS.format(database=database))
    (tmp_path / "tests" / "test_strict.py").write_text(STRICT)
    return tmp_path


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "DJANGO_SETTINGS_MODULE": "settings", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_guides_examples_run(project):
    plugins = ("-p", "spark_outbox.pytest_plugin", "-n", "2", "--cov", "orders")
    (project / "pytest.ini").write_text("[pytest]\nspark_outbox_strict = true\nfilterwarnings = error\n")
    done = run(project, "-m", "pytest", *plugins, "tests")
    assert sorted(re.findall(r"^FAILED \S+/(\S+)", done.stdout, re.MULTILINE)) == [
        "test_strict.py::TestOfAClass::test_a_typo_in_a_fixture",
        "test_strict.py::test_a_typo",
        "test_strict.py::test_a_typo_that_has_consequences",
    ], done.stdout + done.stderr
    assert f"3 failed, {GUIDE.count('def test_') + 1} passed" in done.stdout
    assert done.stdout.count("No handler matches the group 'order_piad'") >= 3
    assert re.search(r"^orders/handlers.py .* 100%$", done.stdout, re.MULTILINE)


def test_the_plugin_imports_no_django_before_a_test_asks_for_it(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (tmp_path / "test_it.py").write_text("import sys\ndef test(): assert 'django' not in sys.modules\n")
    plugins = ("-p", "no:django", "-p", "spark_outbox.pytest_plugin")
    done = run(tmp_path, "-m", "pytest", *plugins, DJANGO_SETTINGS_MODULE="")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
