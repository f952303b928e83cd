"""The files of deploy/, filled in for a project, and what to do with them.

They are valid as they stand, for a project `shop` in /srv/shop. A wheel has them in the package.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from django.db import DEFAULT_DB_ALIAS

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = PACKAGE / "deploy"
FOLDER = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "deploy"


@dataclass(frozen=True, kw_only=True)
class Project:
    """What the files are filled in for."""

    name: str
    """Lower-case letters, digits and hyphens, as Kubernetes has it."""
    user: str
    folder: str
    settings: str
    wsgi: str
    """As gunicorn wants it: `module`, or `module:name`."""
    database: str
    python: str
    protect_home: str = "yes"
    """As systemd has it: `yes`, or `read-only`."""

    def fill(self, text: str) -> str:
        """Put this project in the place of the shop."""
        words = {
            "/srv/shop/venv/bin/python": self.python,
            "/srv/shop": self.folder,
            "shop.settings": self.settings,
            "shop.wsgi": self.wsgi,
            "--database=default": f"--database={self.database}",
            "User=shop": f"User={self.user}",
            "ProtectHome=yes": f"ProtectHome={self.protect_home}",
            "u shop": f"u {self.user}",  # of sysusers.d
            ":shop :shop": f":{self.user} :{self.user}",  # a folder's owner and group, of tmpfiles.d
            "shop_": self.name.replace("-", "_") + "_",
        }
        if self.database != DEFAULT_DB_ALIAS:
            words["WORKER_OPTIONS=\n"] = f"WORKER_OPTIONS=--database={self.database}\n"
        found = "|".join([*map(re.escape, words), "shop(?![A-Za-z0-9])"])
        return re.sub(f"(?<![A-Za-z0-9])(?:{found})", lambda m: words.get(m[0], self.name), text)


class Kit(NamedTuple):
    """Files that belong together, relative to deploy/, and commands to paste, from their folder."""

    files: tuple[str, ...]
    steps: str

    def texts(self, project: Project) -> dict[str, str]:
        """Return each file's text by its name, both filled in."""
        paths = [FOLDER / file for file in self.files]
        return {project.fill(path.name): project.fill(path.read_text()) for path in paths}


KITS = {
    "systemd": Kit(
        (
            "systemd/shop-worker@.service",
            "systemd/worker.env",
            "systemd/sysusers.conf",
            "systemd/tmpfiles.conf",
            "systemd/journald.conf",
        ),
        """\
As root, on the machine that is to run it:

    install -D -m 0644 sysusers.conf /etc/sysusers.d/shop.conf && systemd-sysusers
    install -D -m 0644 tmpfiles.conf /etc/tmpfiles.d/shop.conf && systemd-tmpfiles --create
    cp shop-worker@.service /etc/systemd/system/
    install -m 0600 worker.env /etc/shop/worker.env
    editor /etc/shop/worker.env
    systemctl daemon-reload
    systemctl enable --now shop-worker@main
    systemctl status shop-worker@main

After each deployment of new code: systemctl reload shop-worker@main
journald.conf is an example of how long to keep the log.
""",
    ),
    "timers": Kit(
        ("systemd/shop-sources.service", "systemd/shop-sources.timer"),
        """\
As root, where `spark_deploy systemd` has made user and folders:

    cp shop-sources.service shop-sources.timer /etc/systemd/system/
    systemctl daemon-reload
    systemctl enable --now shop-sources.timer
""",
    ),
    "roles": Kit(
        ("roles.sql",),
        """\
As the owner of the tables, after each `migrate` of spark_outbox:

    python manage.py dbshell --database=default -- --single-transaction --file roles.sql

Then grant them to the roles that your processes and people log in as:

    grant spark_outbox_emitter to shop_web;
    grant spark_outbox_worker to shop_worker;
""",
    ),
    "docker": Kit(
        ("Dockerfile", ".dockerignore"),
        """\
In the folder of manage.py, with spark_outbox, psycopg[binary] and gunicorn in requirements.txt:

    docker build --tag shop .
    docker run --rm --env DATABASE_URL shop python manage.py migrate --database=default
    docker run --detach --name shop-worker --stop-timeout 40 --env DATABASE_URL shop
    docker logs --follow shop-worker
""",
    ),
    "kubernetes": Kit(
        ("kubernetes.yaml",),
        """\
With your image's name in it (see `spark_deploy docker`), and DATABASE_URL and the like in .env:

    kubectl create secret generic shop --from-env-file=.env
    kubectl delete job shop-migrate --ignore-not-found
    kubectl apply --filename kubernetes.yaml
    kubectl rollout status deployment/shop-worker
""",
    ),
    "compose": Kit(
        ("compose.yaml",),
        """\
In the folder of manage.py, with the files of `spark_deploy docker`:

    echo "POSTGRES_PASSWORD=$(openssl rand -hex 24)" >> .env
    docker compose up --build --detach
    docker compose logs --follow worker
""",
    ),
    "grafana": Kit(
        ("grafana/prometheus.json", "grafana/postgresql.json", "grafana/rules.yaml"),
        """\
Where workers run with --metrics-port, have Prometheus scrape that port, and load the alerts:

    cp rules.yaml /etc/prometheus/spark_outbox.yaml
    editor /etc/prometheus/prometheus.yml    # rule_files: [spark_outbox.yaml]
    promtool check config /etc/prometheus/prometheus.yml
    systemctl reload prometheus

In Grafana, import prometheus.json. Without Prometheus, import postgresql.json, for a data source that
logs in as a role of spark_outbox_viewer (see `spark_deploy roles`).
""",
    ),
}
