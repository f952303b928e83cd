"""The page that Prometheus reads where no worker is: put it into the project's urls.py.

    path("metrics/", spark_outbox.observing.views.metrics)

It counts what this process emits, from when this module is imported; if the project's processes share
PROMETHEUS_MULTIPROC_DIR, what all of them emit.
"""

import os
from pathlib import Path

from django.contrib.auth.decorators import login_not_required
from django.db import router
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseForbidden
from django.utils.crypto import constant_time_compare
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from spark_outbox import conf
from spark_outbox.models import OutboxEvent
from spark_outbox.observing import prometheus
from spark_outbox.observing.database import Database
from spark_outbox.observing.files import Bounded, InFiles

PERMISSION = "spark_outbox.view_outboxevent"

FORBIDDEN = "This takes the token of METRICS_TOKEN, or a member of staff who may view events."


def _shared_groups() -> Path | None:
    """Return the file by which the project's processes know of each other's groups."""
    folder = os.environ.get(prometheus.FOLDER)
    return Path(folder) / "spark_outbox_groups" if folder else None


_emitted = CollectorRegistry()
prometheus.counter_of_emitted(_emitted, Bounded(prometheus.MOST_GROUPS, _shared_groups()))
_databases: dict[str, Database] = {}


@login_not_required  # by LoginRequiredMiddleware: this asks by itself
@never_cache
@require_safe
def metrics(request: HttpRequest) -> HttpResponse:
    """Answer who has the token of SPARK_OUTBOX["METRICS_TOKEN"], and staff who may view events.

    Others who say who they are get 403, strangers 404.
    """
    if not _has_token(request) and not _may_view(request):
        if request.headers.get("Authorization") or _is_known(request):
            return HttpResponseForbidden(FORBIDDEN)
        raise Http404
    alias = router.db_for_read(OutboxEvent)
    database = _databases.setdefault(alias, Database(alias))
    folder = os.environ.get(prometheus.FOLDER)
    emitted: Collector = InFiles(Path(folder)) if folder else _emitted
    return HttpResponse(prometheus.scrape(emitted, database), content_type=prometheus.CONTENT_TYPE)


def _has_token(request: HttpRequest) -> bool:
    wanted = conf.current().METRICS_TOKEN
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return bool(wanted) and scheme.lower() == "bearer" and constant_time_compare(token.strip(), wanted)


def _is_known(request: HttpRequest) -> bool:
    user = getattr(request, "user", None)  # a project need not have users
    return user is not None and bool(user.is_authenticated)


def _may_view(request: HttpRequest) -> bool:
    if not _is_known(request):
        return False
    user = request.user
    return bool(user.is_active and user.is_staff and user.has_perm(PERMISSION))
