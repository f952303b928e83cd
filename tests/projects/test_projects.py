"""Projects of others: what they commit has its events, each is handled, and nothing else is."""

import importlib.util
from collections import Counter

import pytest

from tests.projects.rig import Project
from tests.tools import eventually, free_port, get

pytestmark = [
    pytest.mark.projects,
    pytest.mark.skipif(
        any(
            importlib.util.find_spec(name) is None
            for name in ("httpx", "ninja", "oscar", "uvicorn", "wagtail")
        ),
        reason="needs other people's projects: tox -e projects",
    ),
]


@pytest.fixture
def nightly(request):
    return request.config.getoption("nightly")


@pytest.fixture
def balance(capfd):
    """A function that prints the figures of a run, and fails if its books don't balance."""

    def check(project, owed, counts, **options):
        faults = project.faults(owed, **options)
        with capfd.disabled():
            figures = {
                **project.figures(),
                **counts,
                **{name: len(keys) for name, keys in faults.items()},
            }
            print("", *(f"  {count:7,} {name}" for name, count in figures.items()), sep="\n")
        assert {name: sorted(keys)[:10] for name, keys in faults.items() if keys} == {}

    return check


ACTIONS = """
select action, count(*) from wagtailcore_pagelogentry where user_id is not null group by action
"""
PAGES = """
select 'logged_' || id from wagtailcore_pagelogentry
union all select format('published_%s_%s', page_id, revision_id) from wagtailcore_pagelogentry
where action = 'wagtail.publish'
union all select format('revised_%s_%s', page_id, revision_id) from wagtailcore_pagelogentry
where action = 'wagtail.edit'
"""


def test_a_magazine_made_with_wagtail(tmp_path, nightly, balance):
    with Project("magazine", tmp_path) as project:
        counts = project.drive(1000 if nightly else 40)
        project.settle()
        actions = Counter(project.counts(ACTIONS))
        balance(project, project.keys(PAGES), counts)
    for action in ("publish", "unpublish", "move", "delete", "create"):
        assert actions[f"wagtail.{action}"] == counts[action] > 0, action
    # Who creates or publishes a page edits it as well.
    assert actions["wagtail.edit"] == counts["edit"] + counts["publish"] + counts["create"]
    assert counts["rolled back"] > 0


def test_a_shop_made_with_oscar(tmp_path, nightly, balance):
    with Project("shop", tmp_path) as project:
        counts = project.drive(150 if nightly else 10)
        project.settle()
        orders = project.keys("select 'ordered_' || number from order_order")
        lines = project.keys("select 'sold_' || id from order_line")
        balance(project, orders | lines, counts)
    assert (len(orders), len(lines)) == (counts["ordered"], counts["sold"])
    assert counts["rolled back"] > 0


PARTS = r"""
select substring(key from '^pinged_\d+_') from spark_outbox_event where key ~ '^pinged_\d+_'
group by 1 having count(*) <> 3
"""
"""Of those that one statement writes, those that are not whole."""

KEYS = {
    "note": ["noted_{}"],
    "bridge": ["noted_{}"],
    "ping": ["pinged_{}"],
    "pings": ["pinged_{}_0", "pinged_{}_1", "pinged_{}_2"],
}
"""Of the events of a request, by its view."""


def test_a_service_made_with_ninja_on_uvicorn(tmp_path, nightly, balance):
    requests, port = 8000 if nightly else 400, str(free_port())

    def start():
        application = "tests.projects.service.asgi:application"
        server = project.start(
            "-m", "uvicorn", application, "--port", port, "--no-access-log", log="uvicorn"
        )
        eventually(lambda: get(int(port), "/"))
        return server

    def restart():
        server.kill()
        return start()

    def emitted(*ends):
        paths = [path.split("/") for path, end in sent.items() if end in ends]
        return {key.format(number) for view, number in paths for key in KEYS[view]}

    with Project("service", tmp_path) as project:
        server = start()
        project.start_driver(port, str(requests))
        project.wait_for_events(requests // 4)
        server = restart()
        project.hurt(requests // 2)
        server = restart()
        (sent,) = project.results()
        server.terminate()  # which waits for what clients that hung up have left behind
        server.wait()
        project.settle()

        notes = project.keys("select 'noted_' || name from service_note")
        certain = {key for key in emitted("acknowledged", "doomed") if key.startswith("pinged")}
        possible = {key for key in emitted("hung up", "cut off") if key.startswith("pinged")}
        balance(project, notes | certain, Counter(sent.values()), possible=possible)
        assert project.keys(PARTS) == set()
    assert emitted("acknowledged") - certain <= notes
    assert not (emitted("doomed") & notes)
    assert "cut off" in sent.values() or not nightly
