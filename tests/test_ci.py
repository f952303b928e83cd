"""What `.ci/run` starts leaves nothing behind."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.chaos import hosts
from tests.postgres import ROOT
from tests.tools import PATIENCE, eventually

DOCKERD = """#!/bin/sh
ip link add docker_bridge type bridge
echo 1 > /proc/sys/net/ipv4/ip_forward
ip link show lo up
touch "$1"
exec sleep 1000
"""


def links() -> str:
    return subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout


@pytest.mark.netns
def test_the_docker_engine_changes_no_network_but_its_own(tmp_path):
    if why_not := hosts.why_not():
        pytest.skip(why_not)
    dockerd, started = tmp_path / "dockerd", tmp_path / "started"
    dockerd.write_text(DOCKERD)
    dockerd.chmod(0o755)
    forwarding = Path("/proc/sys/net/ipv4/ip_forward")
    before = forwarding.read_text()
    engine = subprocess.Popen(
        [ROOT / ".ci" / "docker-engine", started],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(started.exists)
        within = ["nsenter", f"--net=/proc/{engine.pid}/ns/net", "ip", "link"]
        there = subprocess.run(within, capture_output=True, text=True, check=True)
        assert "docker_bridge" in there.stdout
        assert "docker_bridge" not in links()
        assert forwarding.read_text() == before
    finally:
        engine.send_signal(signal.SIGTERM)
        output, _ = engine.communicate(timeout=PATIENCE)
    assert "LOOPBACK,UP" in output
    assert engine.returncode == -signal.SIGTERM
