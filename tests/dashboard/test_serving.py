"""`spark_demo --serve`, in processes of its own, as a newcomer has it."""

import os
import re
import signal
import subprocess
import sys
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, build_opener

import pytest
from django.contrib.auth.models import User

from spark_outbox.models import WorkerSession
from tests.postgres import ROOT
from tests.tools import PATIENCE, conninfo, eventually


@pytest.mark.django_db(transaction=True)
def test_a_newcomer_sees_it_all(tmp_path):
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        demo = subprocess.Popen(
            [sys.executable, "manage.py", "spark_demo", "--serve", "--port", "0", "--rate", "50"],
            cwd=ROOT,
            env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", "DATABASE_URL": conninfo()},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        lines = demo.stdout.readline() + demo.stdout.readline()
        said = re.fullmatch(
            r"dashboard  (http://127\.0\.0\.1:\d+/\S+)\n +login  (\w+), password (\w+)\n", lines
        )
        assert said, errors.read_text()
        url, name, password = said.groups()
        browser = build_opener(HTTPCookieProcessor(CookieJar()))

        def get(address, **fields):
            with browser.open(address, urlencode(fields).encode() if fields else None) as answer:
                return answer.read().decode()

        form = get(url)  # the login, for the dashboard is for staff
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', form)[1]
        site = url.partition("/admin/")[0]
        fields = {"username": name, "password": password, "next": url.removeprefix(site)}
        html = get(f"{site}/admin/login/", csrfmiddlewaretoken=token, **fields)
        assert '<p class="spark-environment">' in html
        assert "--spark-ok" in get(f"{site}/static/spark_outbox/dashboard.css")
        eventually(lambda: re.search(r'data-tile="failed"><a [^>]*>[1-9]', get(url)))
        assert "mail_receipt" in get(f"{url}triage/")
        port = int(site.rpartition(":")[2])
        listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()]
        here = f"0100007F:{port:04X}"
        assert {at for at in listening if at.endswith(here[-5:])} == {here}  # nobody else can connect
        demo.send_signal(signal.SIGINT)
        assert demo.wait(PATIENCE) == 0
    finally:
        demo.kill()
        output, _ = demo.communicate()
    assert output.endswith("Ended.\n")
    assert "Traceback" not in errors.read_text()
    assert not WorkerSession.objects.exists()  # its worker has stopped, too
    assert not User.objects.get().has_usable_password()
    with pytest.raises(URLError):
        get(url)
