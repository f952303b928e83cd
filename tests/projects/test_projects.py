"""Projects of others: what they commit has its events, each is handled, and nothing else is."""

import asyncio
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


def test_a_service_made_with_ninja_on_uvicorn(tmp_path, nightly, balance):
    from tests.projects.service.load import Load

    port = free_port()
    application = "tests.projects.service.asgi:application"

    def start(project):
        options = ("--port", str(port), "--no-access-log")
        server = project.start("-m", "uvicorn", application, *options, log="uvicorn")
        eventually(lambda: get(port, "/"))
        return server

    def hurt(project, server, requests):
        """Kill the server before and after the workers; return the one that is there at last."""
        project.wait_for_events(requests // 4)
        server.kill()
        server = start(project)
        project.hurt(requests // 2)
        server.kill()
        return start(project)

    async def run(project, load):
        server = start(project)
        hurting = asyncio.to_thread(hurt, project, server, load.requests)
        server, _ = await asyncio.gather(hurting, load.run())
        server.terminate()  # which waits for what clients that hung up have left behind
        await asyncio.to_thread(server.wait)

    with Project("service", tmp_path) as project:
        load = Load(port, 8000 if nightly else 400)
        asyncio.run(run(project, load))
        project.settle()
        notes = project.keys("select 'noted_' || name from service_note")
        pings = {end: load.pings(end) for end in ("acknowledged", "doomed", "hung up", "cut off")}
        owed = notes | pings["acknowledged"] | pings["doomed"]
        balance(project, owed, load.counts, possible=pings["hung up"] | pings["cut off"])
        parts = project.keys(PARTS)
    assert parts == set()
    assert load.notes("acknowledged") <= notes
    assert not load.notes("doomed") & notes
    assert load.counts["cut off"] > 0 or not nightly
