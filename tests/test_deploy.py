"""The files of deploy/: each is valid, as it stands and filled in for a project; and `spark_deploy`."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from django.core.management import call_command, load_command_class
from django.core.management.base import CommandError

from spark_outbox.management.kits import FOLDER, KITS, Project
from tests.postgres import ROOT
from tests.shop import SHOP, build_wheel
from tests.tools import PATIENCE, manage

OTHER = Project(
    name="my-club",
    user="anna",
    folder="/opt/workshop",
    settings="club.settings.production",
    wsgi="club.web:app",
    database="other",
    python="/opt/workshop/.venv/bin/python",
)


def text(kit, name, project=SHOP):
    return KITS[kit].texts(project)[name]


def documents(project=SHOP):
    """Return the objects of kubernetes.yaml by kind."""
    found = yaml.safe_load_all(text("kubernetes", "kubernetes.yaml", project))
    return {document["kind"]: document for document in found}


def services(project=SHOP):
    return yaml.safe_load(text("compose", "compose.yaml", project))["services"]


def pods(project=SHOP):
    """Return the specs of all pods by the kind of what makes them."""
    specs = {kind: document["spec"] for kind, document in documents(project).items()}
    specs["CronJob"] = specs["CronJob"]["jobTemplate"]["spec"]
    return {kind: spec["template"]["spec"] for kind, spec in specs.items()}


def image_command(project=SHOP):
    found = re.search(r"^CMD (\[.*?\])", text("docker", "Dockerfile", project), re.M | re.S)
    return yaml.safe_load(found[1].replace("\\\n", ""))


def worker_commands(project=SHOP):
    return {
        "docker": image_command(project),
        "compose": services(project)["worker"]["command"],
        "kubernetes": pods(project)["Deployment"]["containers"][0]["command"],
    }


def parsed(command):
    """Parse the command line of one of our commands, as that command does."""
    python, script, name, *arguments = command
    assert (python, script) == ("python", "manage.py")
    app = "django.core" if name == "migrate" else "spark_outbox"
    return load_command_class(app, name).create_parser(script, name).parse_args(arguments)


def run(*command):
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# The files


def test_each_file_is_in_one_kit():
    there = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    others = {file for file in there if file.startswith("screenshots/")} | {"README.md"}
    assert sorted(there - others) == sorted(file for kit in KITS.values() for file in kit.files)


@pytest.mark.parametrize("kit", KITS)
def test_the_files_are_their_own_template(kit):
    for file in KITS[kit].files:
        assert text(kit, Path(file).name) == (FOLDER / file).read_text()


@pytest.mark.parametrize("kit", KITS)
def test_nothing_of_the_shop_is_left_in_another_project(kit):
    texts = "\n".join([*KITS[kit].texts(OTHER).values(), OTHER.fill(KITS[kit].steps)])
    assert re.findall(r".*\bshop.*", texts.replace("/opt/workshop", "")) == []
    assert "--database=default" not in texts


@pytest.mark.parametrize("kit", ["systemd", "timers"])
def test_projects_on_one_host_share_no_unit_and_no_file_of_theirs(kit):
    def places(project):
        """Return the units, and the files below /etc that they and the steps name."""
        texts = KITS[kit].texts(project)
        units = [name for name in texts if name.endswith((".service", ".timer"))]
        return {
            *units,
            *re.findall(
                r"(?<!\w)/etc/[^\s:,]+", "\n".join([*texts.values(), project.fill(KITS[kit].steps)])
            ),
        }

    shared = places(SHOP) & places(OTHER)
    assert {path for path in shared if not path.endswith("/")} <= {
        "/etc/systemd/journald.conf.d/spark-worker.conf"
    }


@pytest.mark.parametrize("project", [SHOP, OTHER])
def test_the_dockerfile_passes_hadolint(project, tmp_path):
    (tmp_path / "Dockerfile").write_text(text("docker", "Dockerfile", project))
    run("hadolint", tmp_path / "Dockerfile")


@pytest.mark.parametrize("project", [SHOP, OTHER])
def test_the_compose_file_matches_the_schema(project, tmp_path):
    (tmp_path / "compose.yaml").write_text(text("compose", "compose.yaml", project))
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "compose.yaml")


@pytest.mark.parametrize("project", [SHOP, OTHER])
def test_the_kubernetes_file_matches_the_schema(project):
    for document in documents(project).values():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("kit", ["docker", "compose", "kubernetes"])
def test_a_worker_is_killed_only_after_its_shutdown_timeout(kit):
    grace = {
        "docker": int(re.search(r"--stop-timeout (\d+)", KITS["docker"].steps)[1]),
        "compose": int(services()["worker"]["stop_grace_period"].removesuffix("s")),
        "kubernetes": pods()["Deployment"]["terminationGracePeriodSeconds"],
    }
    assert 0 < parsed(worker_commands()[kit]).shutdown_timeout < grace[kit]


def test_the_commands_are_those_of_the_project():
    commands = [
        *worker_commands(OTHER).values(),
        services(OTHER)["migrate"]["command"],
        pods(OTHER)["Job"]["containers"][0]["command"],
    ]
    assert {parsed(command).database for command in commands} == {"other"}
    parsed(pods(OTHER)["CronJob"]["containers"][0]["command"])
    parsed(shlex.split(re.search(r"do (.*?);", services(OTHER)["sweep"]["command"][-1])[1]))
    assert services(OTHER)["web"]["command"][-1] == "club.web:app"


def test_the_image_looks_at_the_file_that_its_worker_renews():
    path = parsed(image_command()).liveness_file
    assert f"os.stat('{path}')" in text("docker", "Dockerfile")
    assert parsed(services()["worker"]["command"]).liveness_file == path


def test_the_probes_look_where_the_worker_answers():
    (worker,) = pods()["Deployment"]["containers"]
    (port,) = worker["ports"]
    assert f"--health-port=0.0.0.0:{port['containerPort']}" in worker["command"]
    probes = {name: worker[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/live",
        "liveness": "/live",  # needs no database: a restart would not bring it back
        "readiness": "/ready",
    }


def test_containers_have_no_rights_that_they_do_not_need():
    (user,) = re.findall(r"^USER (\d+):\1$", text("docker", "Dockerfile"), re.MULTILINE)
    for pod in pods().values():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == int(user)
        assert not pod["automountServiceAccountToken"]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    for name, service in services().items():
        if name != "db":
            assert service["read_only"]
            assert service["cap_drop"] == ["ALL"]


def test_no_release_leaves_a_gap_and_no_sweep_meets_another():
    found = documents()
    assert found["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert found["CronJob"]["spec"]["concurrencyPolicy"] == "Forbid"


# The command


def test_it_prints_the_files_and_says_what_to_do_with_them():
    done = manage("spark_deploy", "kubernetes", "--name", "club")
    assert done.returncode == 0, done.stderr
    assert [document["metadata"]["name"] for document in yaml.safe_load_all(done.stdout)] == [
        "club-migrate",
        "club-worker",
        "club-sources",
    ]
    assert "kubectl rollout status deployment/club-worker" in done.stderr


def test_it_names_each_of_several_files(capsys):
    call_command("spark_deploy", "docker")
    assert re.findall("^# ==> (.*) <==$", capsys.readouterr().out, re.MULTILINE) == [
        "Dockerfile",
        ".dockerignore",
    ]


def test_it_writes_the_files_and_overwrites_none_unless_told_to(tmp_path):
    folder = tmp_path / "new" / "folder"
    call_command("spark_deploy", "docker", "--output", folder)
    assert {path.name for path in folder.iterdir()} == {"Dockerfile", ".dockerignore"}
    (folder / "Dockerfile").write_text("mine")
    (folder / ".dockerignore").unlink()
    with pytest.raises(CommandError, match=r"Dockerfile: there already. Give --force"):
        call_command("spark_deploy", "docker", "--output", folder)
    assert (folder / "Dockerfile").read_text() == "mine"
    assert not (folder / ".dockerignore").exists()
    call_command("spark_deploy", "docker", "--output", folder, "--force")
    assert "DJANGO_SETTINGS_MODULE=tests.pytest_settings" in (folder / "Dockerfile").read_text()


@pytest.mark.parametrize("name", ["My_Club", "-club", "club-", "c" * 41, ""])
def test_a_name_that_kubernetes_would_refuse_is_refused(name):
    with pytest.raises(CommandError, match="is no name"):
        call_command("spark_deploy", "kubernetes", f"--name={name}")


@pytest.mark.parametrize(
    ("module", "folder", "name"),
    [
        ("club.settings", "/srv/www", "club"),
        ("my_club.settings", "/srv/www", "my-club"),
        ("config.settings.production", "/srv/Club_2", "club-2"),
        ("settings", "/srv/club", "club"),
    ],
)
def test_a_project_whose_settings_are_called_like_many_has_its_folders_name(
    module, folder, name, monkeypatch, capsys
):
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", module)
    call_command("spark_deploy", "kubernetes", folder=folder)
    assert f"deployment/{name}-worker" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["/app", "/", "/srv/42"])
def test_a_project_without_a_name_is_asked_for_one(folder, monkeypatch):
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "config.settings")
    with pytest.raises(CommandError, match="give --name"):
        call_command("spark_deploy", "kubernetes", folder=folder)
    call_command("spark_deploy", "kubernetes", folder=folder, name="club")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, "config.wsgi"),
        ("config.web.wsgi.application", "config.web.wsgi"),
        ("config.web.app", "config.web:app"),
    ],
)
def test_the_web_processes_serve_the_application_of_the_settings(
    given, found, monkeypatch, settings, capsys
):
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "config.settings")
    settings.WSGI_APPLICATION = given
    call_command("spark_deploy", "compose", name="club")
    services = yaml.safe_load(capsys.readouterr().out)["services"]
    assert services["web"]["command"][-1] == found


def deploy_on_host(kit="systemd", **options):
    given = {"name": "club", "folder": "/srv/club", "python": "/srv/club/venv/bin/python", **options}
    call_command("spark_deploy", kit, **given)


@pytest.mark.parametrize("kit", ["systemd", "timers"])
@pytest.mark.parametrize("option", ["folder", "python"])
@pytest.mark.parametrize(
    "path", ["/srv/my club", "/srv/100%", "/srv/'", '/srv/"', "/srv/\\", "club", "."]
)
def test_a_path_that_a_unit_would_misread_is_refused(kit, option, path):
    with pytest.raises(CommandError, match=rf"--{option} .*absolute path, without spaces.* link"):
        deploy_on_host(kit, **{option: path})


@pytest.mark.parametrize("kit", ["systemd", "timers"])
@pytest.mark.parametrize(
    ("option", "way_out"), [("folder", "Move the project"), ("python", "Install Python elsewhere")]
)
def test_a_path_that_the_units_do_not_see_is_refused(kit, option, way_out, tmp_path, capsys):
    (tmp_path / "link").symlink_to("/root/.local/share/python3")
    for path in ("/home/anna/club", "/srv/../home/anna", "/run/user/1000/club", str(tmp_path / "link")):
        with pytest.raises(CommandError, match=f"--{option} {path} is at /.*{way_out}"):
            deploy_on_host(kit, **{option: path})
        deploy_on_host(kit, **{option: path, "protect_home": "read-only"})
        printed = capsys.readouterr().out
        assert path in printed
        assert "ProtectHome=read-only" in printed
        assert "ProtectHome=yes" not in printed
    deploy_on_host(kit, **{option: "/srv/home/club"})


def test_containers_do_not_mind_where_the_project_is():
    call_command("spark_deploy", "docker", folder="/home/anna/my club", user="no user")


@pytest.mark.parametrize("user", ["c" * 32, "Anna", "anna b", "4711", "-club"])
def test_a_name_that_no_system_user_can_have_is_refused(user):
    with pytest.raises(CommandError, match="can't be a system user"):
        deploy_on_host(user=user)
    deploy_on_host(user="c" * 31)


def test_a_long_name_needs_another_user_on_a_host_alone():
    with pytest.raises(CommandError, match="Give another --user"):
        deploy_on_host(name="c" * 32)
    deploy_on_host(name="c" * 32, user="club")
    call_command("spark_deploy", "kubernetes", name="c" * 32)


def test_the_user_of_the_image_is_the_same_for_each_project():
    (line,) = re.findall("^RUN useradd .*", text("docker", "Dockerfile", OTHER), re.MULTILINE)
    assert "--uid 10001 " in line
    assert line.endswith(" worker")


def test_an_unknown_database_is_refused():
    with pytest.raises(CommandError, match="DATABASES has no 'events'"):
        call_command("spark_deploy", "compose", "--database", "events")


def test_an_installed_wheel_has_the_files(tmp_path):
    build_wheel(tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index")
    run(*pip, "--target", installed, wheel)
    for kit in KITS.values():
        for file in kit.files:
            copy = installed / "spark_outbox" / "deploy" / file
            assert copy.read_text() == (FOLDER / file).read_text()
            copy.write_text("# of the wheel")
    (tmp_path / "club.py").write_text(
        "INSTALLED_APPS = ['spark_outbox']\n"
        "DATABASES = {'default': {'ENGINE': 'django.db.backends.postgresql'}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "django", "spark_deploy", "kubernetes"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{installed}:{tmp_path}", "DJANGO_SETTINGS_MODULE": "club"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "# of the wheel\n"), done.stderr
    assert "deployment/club-worker" in done.stderr
