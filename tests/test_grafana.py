"""The dashboards and alerts of deploy/grafana: each metric is there, and each query runs."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from spark_outbox import emit
from spark_outbox.management.kits import FOLDER
from tests.observing.scraping import every_name
from tests.store.conftest import logins  # noqa: F401, a fixture

pytestmark = pytest.mark.django_db(transaction=True)

GRAFANA = FOLDER / "grafana"
RULES = GRAFANA / "rules.yaml"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(GRAFANA.glob("*.json"))}


def targets(name):
    return [target for panel in BOARDS[name]["panels"] for target in panel["targets"]]


def rules():
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.promtool
def test_the_alerts_are_those_that_promtool_accepts():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    done = subprocess.run(
        [promtool, "check", "rules", RULES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_says_what_to_do():
    assert len(rules()) >= 6
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "remedy"}
        assert rule["labels"]["severity"] in {"warning", "critical"}


def test_each_metric_of_dashboard_and_alerts_is_in_a_real_scrape():
    expressions = [*(target["expr"] for target in targets("prometheus")), *(r["expr"] for r in rules())]
    names = {name for expression in expressions for name in re.findall(r"spark_outbox_\w+", expression)}
    assert len(names) > 15
    assert names - every_name() == set()


def test_no_query_adds_up_what_was_read_at_different_moments():
    """An event that has moved to another state meanwhile would count twice."""
    expressions = [*(target["expr"] for target in targets("prometheus")), *(r["expr"] for r in rules())]
    assert not [each for each in expressions if re.search(r"(sum|count)[^(]*(\([^(]*\) )?\(max", each)]


@pytest.mark.parametrize("sql", [target["rawSql"] for target in targets("postgresql")])
def test_each_query_of_the_dashboard_runs_as_the_viewer(logins, sql):  # noqa: F811
    emit("g", "key")
    with logins.connect("viewer") as viewer:
        assert viewer.execute(sql).description


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_can_be_imported_anywhere(name):
    """It names no data source but the one that is chosen, and no panel covers another."""
    (variable,) = BOARDS[name]["templating"]["list"]
    panels = BOARDS[name]["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {f"${{{variable['name']}}}"}
    assert {panel["datasource"]["type"] for panel in panels} == {variable["query"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(covered) == len(set(covered))
    assert max(x for x, _ in covered) < 24
