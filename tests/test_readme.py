"""What the README shows is run."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from datetime import date, timedelta
from unittest.mock import AsyncMock, Mock

import pytest
from django.core.management import get_commands
from django.db import connection
from markdown_it import MarkdownIt

import tests.challenges.models
from spark_outbox import conf, emit
from spark_outbox.models import OutboxEvent
from spark_outbox.testing import drain
from tests.postgres import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = [token for token in MarkdownIt().parse(README) if token.type == "fence"]


def blocks(info):
    return [block.content for block in BLOCKS if block.info == info]


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
    run = (ROOT / ".ci" / "run").read_text()
    assert "readme_command demo" in run
    assert "readme_command dev" in run


def test_the_tutorial_works_when_pasted(tmp_path):
    script = "\n".join(blocks("bash tutorial"))
    # Root and services have no XDG_RUNTIME_DIR, and a dependency warns of that.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DJANGO", "XDG"))}
    bin_folder = os.path.dirname(sys.executable)  # noqa: PTH120, not through the symlink
    done = subprocess.run(
        ["bash", "-eu", "-c", script],
        cwd=tmp_path,
        env={**environment, "PATH": f"{bin_folder}:{environment['PATH']}"},
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


@pytest.mark.django_db
def test_the_python_blocks_run_in_order(own_registry, monkeypatch):
    today = date.today()
    namespace = {
        "today": today,
        "in_a_month": today + timedelta(days=30),
        "log": [],
        "sent": [],
        "search": Mock(**{"bulk.side_effect": lambda numbers: ["ok"] * len(numbers)}),
        "http": Mock(post=AsyncMock()),
        "write_report": Mock(),
        "__name__": "readme",
    }
    exec(
        "from django.db import transaction\n"
        "from spark_outbox import emit\n"
        "from tests.challenges.models import Challenge, Donation\n",
        namespace,
    )
    for number, code in enumerate(blocks("python")):
        exec(compile(code, f"README.md, Python block {number}", "exec"), namespace)
    assert tests.challenges.models.Challenge.objects.count() == 2
    assert "announced_now" in {key for _, _, key, _, _ in namespace["log"]}
    assert OutboxEvent.objects.filter(status="pending", available_at=None).count() == 0
    emit("search_index", "index", number=1)
    emit("webhook", "hook", url="here")
    emit("export", "export", number=2)
    drain()
    namespace["search"].bulk.assert_called_once_with([1])
    namespace["http"].post.assert_called_once_with("here", json={"key": "hook"})
    namespace["write_report"].assert_called_once_with(2)

    conf.Settings(**namespace["SPARK_OUTBOX"])
    with connection.cursor() as cursor:
        cursor.execute('create temp table spark_event (key text, "group" text, created_at timestamptz)')
        cursor.execute("insert into spark_event values ('old', 'g', now())")
        cursor.execute(namespace["KEEP_HANDLED_KEYS"])
    assert OutboxEvent.objects.get(key="old").status == "done"
    assert emit("g", "old") is None


@pytest.mark.django_db
@pytest.mark.parametrize("sql", blocks("sql"))
def test_each_sql_block_runs(sql):
    emit("order_paid", "order_paid_1")
    emit("order_paid", "order_paid_2")
    OutboxEvent.objects.filter(key="order_paid_2").update(attempts=1, last_error="Trace\nError: no\n")
    with connection.cursor() as cursor:
        for statement in filter(str.strip, sql.split(";\n")):
            cursor.execute(statement)


@pytest.mark.django_db
def test_the_cookbook_has_ten_recipes_and_the_repairs_repair():
    cookbook = README.partition("## SQL cookbook")[2].partition("## Settings")[0]
    assert cookbook.count("```sql") == 10
    repairs = [sql for sql in blocks("sql") if "update" in sql]
    retry, put_back, discard = repairs

    def run(sql):
        with connection.cursor() as cursor:
            for statement in filter(str.strip, sql.split(";\n")):
                cursor.execute(statement)

    def event():
        return OutboxEvent.objects.get(key="order_paid_1")

    emit("order_paid", "order_paid_1", delay=3600)
    OutboxEvent.objects.update(attempts=1)
    run(retry)
    assert event().available_at is None
    OutboxEvent.objects.update(status="failed")
    event().deliveries.create(handler="h", status="failed", attempts=20)
    run(retry)
    delivery = event().deliveries.get()
    assert (event().status, delivery.status, delivery.attempts) == ("pending", "pending", 0)
    OutboxEvent.objects.update(status="unhandled")
    run(put_back)
    assert event().status == "pending"
    event().deliveries.create(handler="shop.handlers.removed")
    run(discard)
    assert event().status == "discarded"
    assert event().deliveries.get(handler="shop.handlers.removed").status == "discarded"


def test_every_setting_and_every_command_is_documented():
    table = README.partition("## Settings")[2].partition("## Testing")[0]
    for field in fields(conf.Settings):
        assert f"| `{field.name}` |" in table
    for command, app in get_commands().items():
        if app == "spark_outbox":
            assert command in README


def test_every_option_of_the_worker_is_documented():
    from spark_outbox.management.commands.spark_worker import Command

    parser = Command().create_parser("manage.py", "spark_worker")
    table = README.partition("## Operating")[2].partition("## Deploying")[0]
    common = {"--help", "--version", "--settings", "--pythonpath", "--traceback", "--no-color"}
    common |= {"--force-color", "--skip-checks", "--verbosity", "--no-reload"}
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--") and option not in common:
                assert option in table


def test_links_within_the_readme_lead_somewhere():
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(#([^)]+)\)", README):
        assert target in headings
    for name in re.findall(r"`((?:deploy|spark_outbox)/[^` ]+)`", README):
        assert (ROOT / name).exists(), name


def test_each_promise_names_the_tests_that_defend_it():
    (promises,) = re.findall(r"^## Promises$(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    items = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^$)", promises, re.MULTILINE | re.DOTALL)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    for number, promise in items:
        assert "::" in promise, number
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promises)
    assert len(named) >= len(items)
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_what_the_deploying_section_copies_is_there():
    for name in re.findall(r"deploy/[\w@.-]+", README):
        assert (ROOT / name).exists(), name
