"""The server of probes and metrics, and clients that are slow."""

import socket
import threading
from functools import partial

import pytest

from spark_outbox.processes import serving
from spark_outbox.processes.serving import Answer, Bounded, Page
from tests.tools import eventually, get

MOST = 3


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(serving, "MOST", MOST)
    monkeypatch.setattr(serving, "DEADLINE", 1.0)
    with Bounded(("127.0.0.1", 0), partial(Answer, {"/live": lambda: Page(b"alive\n")})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_clients_that_are_slow_keep_nobody_else_for_long(port, capfd):
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(MOST)]
    over = threading.Event()

    def drip():
        while not over.wait(0.1):  # each byte by itself comes soon enough
            for each in slow:
                try:
                    each.send(b"G")
                except OSError:
                    return

    drips = threading.Thread(target=drip)
    drips.start()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5) as beyond:
            assert beyond.recv(1) == b""
        eventually(lambda: get(port, "/live") == (200, "alive\n"))
    finally:
        over.set()
        drips.join()
        for each in slow:
            each.close()
    for _ in range(3 * MOST):  # none that has ended counts any more
        eventually(lambda: get(port, "/live") == (200, "alive\n"))
    assert capfd.readouterr().err == ""
