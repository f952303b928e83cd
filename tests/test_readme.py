"""What the READMEs show is run, their links lead somewhere, and nothing that has a name is left out."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from datetime import date, timedelta
from itertools import pairwise
from unittest.mock import AsyncMock, Mock

import pytest
from django.apps import apps
from django.core.management import get_commands, load_command_class
from django.core.management.base import BaseCommand
from django.db import connection
from markdown_it import MarkdownIt

import tests.challenges.models
from spark_outbox import conf, emit, errors
from spark_outbox.bench.figures import MEASURES
from spark_outbox.models import OutboxEvent
from spark_outbox.testing import drain
from tests.postgres import ROOT

FACE, INSIDE, OPERATING, TESTS, BENCH = RUN_HERE = (
    "README.md",
    "spark_outbox/README.md",
    "deploy/README.md",
    "tests/README.md",
    "spark_outbox/bench/README.md",
)
"""In the order in which their Python blocks are run."""
NAMES = (
    *RUN_HERE,
    "spark_outbox/testing/README.md",  # the tests beside what these are about run them
    "spark_outbox/contrib/generators/README.md",
    "spark_outbox/contrib/mails/README.md",
)
READMES = {name: (ROOT / name).read_text() for name in NAMES}
PARSED = {name: MarkdownIt().parse(text) for name, text in READMES.items()}
BLOCKS = [token for name in RUN_HERE for token in PARSED[name] if token.type == "fence"]


def blocks(info, name=None):
    """Return the fenced blocks of this kind: of one README, or of all that are run here."""
    found = BLOCKS if name is None else [each for each in PARSED[name] if each.type == "fence"]
    return [block.content for block in found if block.info == info]


def headings(name):
    """Return each heading: its level, its text, and where it begins and ends."""
    return [
        (int(opening.tag[1:]), inline.content, *inline.map)
        for opening, inline in pairwise(PARSED[name])
        if opening.type == "heading_open"
    ]


def anchors(name):
    """Return what GitHub makes of the headings."""
    return [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for _, text, _, _ in headings(name)]


def links(name):
    for token in PARSED[name]:
        for child in token.children or ():
            if child.type == "link_open":
                yield child.attrs["href"]


def section(name, title):
    """Return the text below a heading, with the sections that are parts of it."""
    ((level, start),) = [(level, end) for level, text, _, end in headings(name) if text == title]
    ends = [begin for other, _, begin, _ in headings(name) if begin >= start and other <= level]
    return "\n".join(READMES[name].splitlines()[start : min(ends, default=None)])


def commands():
    """Return our commands by name."""
    return {
        name: load_command_class(app, name)
        for name, app in get_commands().items()
        if app == "spark_outbox"
    }


# What is shown is run


def test_every_block_is_of_a_kind_that_is_run_or_looked_at_here():
    assert {block.info for block in BLOCKS} == {
        "bash",
        "bash tutorial",
        "console",
        "python",
        "sql",
        "text",
    }


def test_the_two_commands_are_those_that_the_check_runs():
    demo, tests_ = (command.strip() for command in blocks("bash"))
    assert demo == 'pip install -e ".[demo]" && python manage.py spark_demo'
    assert tests_ == 'pip install -e ".[dev]" && pytest'
    assert demo in READMES[FACE].splitlines()
    assert tests_ in READMES[FACE].splitlines()
    run = (ROOT / ".ci" / "run").read_text()
    assert "readme_command demo" in run
    assert "readme_command dev" in run


def follow_the_tutorial(folder, bin_folder, databases=None):
    """Paste it into a shell, with the programs of this environment. Return the shell's environment.

    The text `databases` stands in place of the embedded server, as the README says.
    """
    script = "\n".join(blocks("bash tutorial"))
    if databases:
        embedded = re.compile(r"^# An embedded PostgreSQL\n.*?^(?=END$)", re.MULTILINE | re.DOTALL)
        script, times = embedded.subn(lambda _: databases, script)
        assert times == 1
    # Root and services have no XDG_RUNTIME_DIR, and a dependency warns of that.
    dropped = ("DATABASE_URL", "DJANGO", "EXTRA_APPS", "PYTHONPATH", "XDG")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-eu", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    assert re.findall(r"^Dear (.*?)\. Thank", done.stdout, re.MULTILINE) == [
        "anna@example.com: order_placed",
        "anna@example.com: order_paid",
    ]
    assert "nobody@example.com" not in done.stdout
    return environment


def test_the_tutorial_works_when_pasted(tmp_path):
    follow_the_tutorial(tmp_path, os.path.dirname(sys.executable))  # noqa: PTH120, not through the symlink


@pytest.mark.django_db
def test_the_python_blocks_run_in_order(own_registry, monkeypatch):
    today = date.today()
    namespace = {
        "today": today,
        "in_a_month": today + timedelta(days=30),
        "log": [],
        "sent": [],
        "send_mail": Mock(),
        "search": Mock(**{"bulk.side_effect": lambda numbers: ["ok"] * len(numbers)}),
        "http": Mock(post=AsyncMock()),
        "write_report": Mock(),
        "__name__": "readme",
    }
    exec(
        "from datetime import date, timedelta\n"
        "from django.db import transaction\n"
        "from spark_outbox import emit, handler\n"
        "from tests.challenges.models import Challenge, Donation\n",
        namespace,
    )
    for number, code in enumerate(blocks("python")):
        exec(compile(code, f"READMEs, Python block {number}", "exec"), namespace)
    assert tests.challenges.models.Challenge.objects.count() == 2
    assert "announced_now" in {key for _, _, key, _, _ in namespace["log"]}
    assert OutboxEvent.objects.filter(status="pending", available_at=None).count() == 0
    assert namespace["send_mail"].call_count == 3
    emit("search_index", "index", number=1)
    emit("webhook", "hook", url="here")
    emit("export", "export", number=2)
    drain()
    namespace["search"].bulk.assert_called_once_with([1])
    namespace["http"].post.assert_called_once_with("here", json={"key": "hook"})
    namespace["write_report"].assert_called_once_with(2)

    conf.Settings(**namespace["SPARK_OUTBOX"])


@pytest.mark.django_db
@pytest.mark.parametrize("sql", blocks("sql"))
def test_each_sql_block_runs(sql):
    emit("order_paid", "order_paid_1")
    emit("order_paid", "order_paid_2")
    OutboxEvent.objects.filter(key="order_paid_2").update(attempts=1, last_error="Trace\nError: no\n")
    with connection.cursor() as cursor:
        for statement in filter(str.strip, sql.split(";\n")):
            cursor.execute(statement)


def test_the_cookbook_has_ten_recipes_or_more():
    assert section(OPERATING, "SQL cookbook").count("```sql") >= 10


# Nothing is left out


def test_every_setting_is_documented_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section(FACE, "Settings"), re.MULTILINE)
    documented = {name: ast.literal_eval(default) for name, default in rows}
    assert set(documented) == {field.name for field in fields(conf.Settings)}
    assert conf.Settings(**documented) == conf.Settings()


@pytest.mark.parametrize("command", commands())
def test_every_command_is_documented_with_each_of_its_options(command):
    (text,) = [
        section(name, command)
        for name in NAMES
        if command in [heading for _, heading, _, _ in headings(name)]
    ]
    common = {
        option
        for action in BaseCommand().create_parser("manage.py", "x")._actions
        for option in action.option_strings
    }
    for action in commands()[command].create_parser("manage.py", command)._actions:
        names = [option for option in action.option_strings if option.startswith("--")]
        for name in names or [action.metavar]:
            assert name in common or re.search(rf"`{re.escape(name)}[` ]", text), name


def test_every_system_check_is_documented():
    ids = r"spark_outbox\.[EWI]\d{3}"
    found = re.findall(ids, (ROOT / "spark_outbox" / "checks.py").read_text())
    assert sorted(re.findall(ids, section(OPERATING, "System checks"))) == sorted(found)


def test_every_error_is_documented():
    ours = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    text = section(INSIDE, "Errors")
    assert {name for name in ours if f"`{name}`" not in text} == set()
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) <= ours


@pytest.mark.django_db
def test_every_table_view_and_function_is_documented():
    with connection.cursor() as cursor:
        cursor.execute(
            "select proname from pg_proc where proname like 'spark%' "
            "union select viewname from pg_views where viewname like 'spark%'"
        )
        there = {name for (name,) in cursor.fetchall()}
    there |= {model._meta.db_table for model in apps.get_app_config("spark_outbox").get_models()}
    rows = re.findall(r"^\| `(\w+)", section(INSIDE, "Tables, functions, views"), re.MULTILINE)
    assert sorted(rows) == sorted(there)


def test_every_module_and_folder_of_the_package_is_in_the_table():
    there = {
        path.stem
        for path in (ROOT / "spark_outbox").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem != "__init__"
    }
    rows = re.findall(r"^\| `(\w+)` ", section(INSIDE, "The folders"), re.MULTILINE)
    assert sorted(rows) == sorted(there)


def test_every_measurement_is_documented():
    rows = re.findall(r"^\| `(\w+)` ", section(BENCH, "What they measure"), re.MULTILINE)
    commands()  # which imports all measurements
    assert rows == list(MEASURES)


def test_every_marker_of_the_tests_is_documented():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    text = section(TESTS, "How to run what")
    for marker in options["markers"]:
        assert f"| `{marker.partition(':')[0]}` |" in text


def test_each_promise_names_the_tests_that_defend_it():
    promises = section(TESTS, "Promises")
    items = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^$)", promises, re.MULTILINE | re.DOTALL)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    assert len(items) >= 18
    for number, promise in items:
        assert "::" in promise, number
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promises)
    assert len(named) >= len(items)
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


# Links and lengths


@pytest.mark.parametrize("name", NAMES)
def test_every_link_and_anchor_leads_somewhere(name):
    there = anchors(name)
    assert len(there) == len(set(there))
    for href in links(name):
        if not href.startswith("https://"):
            path, _, anchor = href.partition("#")
            target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
            assert target.is_file(), href
            if anchor:
                assert anchor in anchors(target.relative_to(ROOT).as_posix()), href


def test_the_first_page_leads_to_all_others_and_they_lead_back():
    assert {href.partition("#")[0] for href in links(FACE)} - {""} == set(NAMES) - {FACE}
    for name in set(NAMES) - {FACE}:
        assert os.path.relpath(ROOT / FACE, (ROOT / name).parent) in set(links(name))


@pytest.mark.parametrize("name", RUN_HERE)
def test_every_file_that_is_named_is_there(name):
    for path in re.findall(r"(?<![\w/])(?:deploy|spark_outbox|tests)/[\w./@-]*\w", READMES[name]):
        assert (ROOT / path).exists(), path


def test_the_first_page_is_short():
    lines = READMES[FACE].splitlines()
    assert len(lines) <= 400
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("name", NAMES)
def test_lines_of_text_are_short(name):
    lines = [line for line in READMES[name].splitlines() if len(line) > 100]
    assert [line for line in lines if not line.startswith("|") and "::" not in line] == []
