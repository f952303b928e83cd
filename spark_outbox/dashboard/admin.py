"""The dashboard's pages as those of the model `Dashboard`: their addresses, and who may see them.

Whoever is staff and has the permission `spark_outbox.view_dashboard` may see all of them. To retry or to
discard takes `retry_outboxevent` or `discard_outboxevent` besides.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db import DataError
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest, HttpResponseNotAllowed
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils.translation import gettext as _

from spark_outbox import conf
from spark_outbox.dashboard import figures, triage
from spark_outbox.dashboard.access import alias, may
from spark_outbox.dashboard.links import Links
from spark_outbox.models import Dashboard
from spark_outbox.operating import glance, repair
from spark_outbox.operating.patience import TooSlow
from spark_outbox.operating.triage import explain

EVERY = 5
"""Seconds between two looks of a page that is live."""

if TYPE_CHECKING:
    Base = admin.ModelAdmin[Dashboard]
else:
    Base = admin.ModelAdmin

View = Callable[..., HttpResponse]


@admin.register(Dashboard)
class DashboardAdmin(Base):
    def get_urls(self) -> list[URLPattern]:
        return [
            self._page("", self.changelist_view, "changelist"),
            self._page("fragment/", self.fragment_view, "fragment"),
            self._page("triage/", self.triage_view, "triage"),
            self._page("triage/fragment/", self.triage_fragment_view, "triage_fragment"),
            self._page("triage/kind/", self.kind_view, "kind"),
            self._page("triage/retry/", self.repair_view, "retry", action="retry"),
            self._page("triage/discard/", self.repair_view, "discard", action="discard"),
            self._page("explain/", self.explain_view, "explain"),
        ]

    def _page(self, route: str, view: View, name: str, **arguments: Any) -> URLPattern:
        @wraps(view)
        def allowed(request: HttpRequest, **given: Any) -> HttpResponse:
            if not self.has_view_permission(request):
                raise PermissionDenied
            return view(request, **given)

        page = self.admin_site.admin_view(allowed)
        return path(route, page, arguments, name=f"spark_outbox_dashboard_{name}")

    def get_model_perms(self, request: HttpRequest) -> dict[str, bool]:
        """It can be looked at, and nothing else."""
        return {"view": self.has_view_permission(request)}

    # The dashboard

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> TemplateResponse:
        given = {"title": _("Dashboard"), "live": "fragment", **(extra_context or {})}
        return self._answer(request, "glance", {**given, **self._glance(request)})

    def fragment_view(self, request: HttpRequest) -> TemplateResponse:
        return self._answer(request, "glance_fragment", self._glance(request))

    def _glance(self, request: HttpRequest) -> dict[str, Any]:
        return self._in_time(lambda: figures.context(glance.glance(using=alias()), self._links(request)))

    # Triage

    def triage_view(self, request: HttpRequest) -> TemplateResponse:
        given = {"title": _("Triage"), "live": "triage_fragment"}
        return self._answer(request, "triage", {**given, **self._failures(request)})

    def triage_fragment_view(self, request: HttpRequest) -> TemplateResponse:
        return self._answer(request, "triage_fragment", self._failures(request))

    def _failures(self, request: HttpRequest) -> dict[str, Any]:
        links = self._links(request)
        return self._in_time(lambda: triage.failures(self._actions(request), links, using=alias()))

    def kind_view(self, request: HttpRequest) -> TemplateResponse:
        kind, links = triage.asked_kind(request), self._links(request)
        found = self._in_time(lambda: triage.kind(kind, self._actions(request), links, using=alias()))
        return self._answer(request, "kind", {"title": _("Failure"), "kind": kind, **found})

    def repair_view(self, request: HttpRequest, action: str) -> HttpResponse:
        """Say what a repair would do; or do its next step, if asked by POST."""
        if not may(request, action):
            raise PermissionDenied
        if request.method not in ("GET", "HEAD", "POST"):
            return HttpResponseNotAllowed(["GET", "POST"])
        kind = triage.asked_kind(request)
        given = {"title": _("Retry") if action == "retry" else _("Discard"), "kind": kind}
        if not repair.is_possible(using=alias()):
            problem = _("This database can only be read here.")
            return self._answer(request, "repair", {**given, "problem": problem}, status=403)
        if request.method == "POST":
            try:
                found = self._in_time(lambda: triage.step(request, action, kind, using=alias()))
            except DataError as error:
                return HttpResponseBadRequest(str(error), content_type="text/plain")
        else:
            found = self._in_time(lambda: triage.preview(action, kind, using=alias()))
        return self._answer(request, "repair", {**given, **found})

    # Explain

    def explain_view(self, request: HttpRequest) -> TemplateResponse:
        key = request.GET.get("key", "").replace("\x00", "").strip()
        context: dict[str, Any] = {"title": _("Explain"), "key": key}
        if key:
            context |= self._in_time(lambda: self._explained(request, key))
        return self._answer(request, "explain", context)

    def _explained(self, request: HttpRequest, key: str) -> dict[str, Any]:
        event, sentences = explain(key, using=alias())
        url = self._links(request).event(event["id"]) if event else ""
        return {"event": event, "sentences": sentences, "url": url}

    # What all have

    def _links(self, request: HttpRequest) -> Links:
        return Links(request, self.admin_site)

    def _actions(self, request: HttpRequest) -> list[str]:
        return triage.actions(request, is_possible=repair.is_possible(using=alias()))

    def _in_time(self, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return look()
        except TooSlow:
            return {"problem": _("The database did not answer in time. Try again later.")}

    def _answer(
        self, request: HttpRequest, template: str, context: Mapping[str, Any], *, status: int = 200
    ) -> TemplateResponse:
        request.current_app = self.admin_site.name
        links = self._links(request)
        environment = conf.current().ENVIRONMENT
        common = {
            "opts": self.opts,
            "environment": environment,
            "is_production": environment.lower().startswith("prod"),
            "every": EVERY,
            "is_named_above": template in ("glance", "triage", "explain"),
            "pages": [
                {"name": name, "url": links.page(name), "is_current": template.startswith(first)}
                for name, first in (
                    ("changelist", "glance"),
                    ("triage", ("triage", "kind", "repair")),
                    ("explain", "explain"),
                )
            ],
        }
        if live := context.get("live"):
            common["live_url"] = links.page(live)
        if not template.endswith("_fragment"):
            common = {**self.admin_site.each_context(request), **common}
        return TemplateResponse(
            request, f"spark_outbox/dashboard/{template}.html", {**common, **context}, status=status
        )
