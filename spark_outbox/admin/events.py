"""Events in the admin: the list, the page of one, and the addresses of what can be done to events."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from django.contrib import admin
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.urls import URLPattern, path, reverse
from django.utils.dateparse import parse_datetime
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from spark_outbox.admin import acting, documents, searching
from spark_outbox.admin.asking import ACTIONS
from spark_outbox.admin.base import LookingAdmin, unless_too_slow
from spark_outbox.admin.changelist import (
    EventStateFilter,
    FingerprintFilter,
    GroupFilter,
    HandlerFilter,
)
from spark_outbox.dashboard import wording
from spark_outbox.dashboard.access import alias, may
from spark_outbox.models import DeliveryStatus, EventStatus, OutboxEvent
from spark_outbox.operating import lists, look, repair, replay
from spark_outbox.operating.lists import Page
from spark_outbox.operating.patience import in_time
from spark_outbox.store.listing import Wanted
from spark_outbox.store.reading import EVERY_OTHER
from spark_outbox.store.viewing import Row


def _action(name: str) -> Any:
    """Return an action that Django offers to those who may do it. `changelist_view` answers it."""

    def choose(*_: object) -> None:
        return None

    choose.__name__ = name
    return admin.action(choose, permissions=[name], description=ACTIONS[name].label)


@admin.register(OutboxEvent)
class EventAdmin(LookingAdmin):
    list_display = ("key", "group", "state", "attempts", "emitted", "ended", "error")
    list_filter = (EventStateFilter, GroupFilter, HandlerFilter, FingerprintFilter)
    actions = [_action(name) for name in ACTIONS]

    @admin.display(description=gettext_lazy("state"))
    def state(self, event: OutboxEvent) -> str:
        return _state(event.status, event.digest is not None)

    @admin.display(description=gettext_lazy("emitted"))
    def emitted(self, event: OutboxEvent) -> str:
        return wording.time(str(event.created_at or ""))

    @admin.display(description=gettext_lazy("ended, or due"))
    def ended(self, event: OutboxEvent) -> str:
        return wording.time(str(event.finished_at or event.available_at or ""))

    @admin.display(description=gettext_lazy("error"))
    def error(self, event: OutboxEvent) -> str:
        return event.last_error

    # The list

    def page(self, request: HttpRequest) -> Page:
        where = searching.place(request.GET)
        return lists.events(self._wanted(request), where, size=self.list_per_page, using=alias())

    def _wanted(self, request: HttpRequest) -> Wanted:
        wanted = searching.wanted(request.GET, states=EventStatus.values)
        return lists.with_key(wanted, using=alias())

    def instance(self, row: Row) -> OutboxEvent:
        names = ("id", "key", "group", "status", "attempts", "created_at", "finished_at", "available_at")
        return OutboxEvent(
            **{name: row[name] for name in names},
            last_error=row.get("error") or "",
            digest=0 if row["is_pruned"] else None,
        )

    def row(self, row_id: int) -> Row | None:
        return next(iter(lists.events_by_id([row_id], using=alias())), None)

    @unless_too_slow
    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        if request.method != "POST":
            return super().changelist_view(request, extra_context)
        action = request.POST.get("action", "")
        if not self.has_view_permission(request):
            raise PermissionDenied
        if action not in ACTIONS:
            return acting.back(self, request.GET.urlencode())
        return acting.choose(self, request, ACTIONS[action], lambda: self._chosen(request))

    def _chosen(self, request: HttpRequest) -> list[int]:
        """Return the ids of the events that somebody has selected in the list."""
        if request.POST.get("select_across") == "1":
            return lists.ids_of_events(self._wanted(request), using=alias())
        found = map(searching.number, request.POST.getlist(ACTION_CHECKBOX_NAME))
        return sorted({event_id for event_id in found if event_id is not None})

    # What users may do

    def get_actions(self, request: HttpRequest, action_location: Any = None) -> Any:
        given = () if action_location is None else (action_location,)  # as Django does from 6.1 on
        found = super().get_actions(request, *given)
        return found if found and repair.is_possible(using=alias()) else {}

    def has_retry_permission(self, request: HttpRequest) -> bool:
        return may(request, "retry")

    def has_discard_permission(self, request: HttpRequest) -> bool:
        return may(request, "discard")

    def has_replay_permission(self, request: HttpRequest) -> bool:
        return may(request, "replay")

    def has_rehearse_permission(self, request: HttpRequest) -> bool:
        return may(request, "rehearse") and replay.can_rehearse(using=alias())

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view
        named: Callable[[str], str] = "spark_outbox_outboxevent_{}".format
        return [
            *(
                path(f"{name}/", view(self.act_view), {"name": name}, name=named(name))
                for name in ACTIONS
            ),
            path("<str:object_id>/<str:name>.json", view(self.document_view), name=named("document")),
            *super().get_urls(),
        ]

    @unless_too_slow
    def act_view(self, request: HttpRequest, name: str) -> HttpResponseBase:
        if not self.has_view_permission(request):
            raise PermissionDenied
        return acting.act(self, request, ACTIONS[name])

    # The page of one event

    @unless_too_slow
    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        with in_time(using=alias()):
            event = self._event(request, object_id)
            possible = acting.possible(using=alias())
        actions = [
            {"label": action.label, "url": acting.address(self, action, event["id"])}
            for action in ACTIONS.values()
            if action.name in possible and may(request, action.name) and action.fits(event)
        ]
        find = documents.finder(request, self.admin_site)
        context = {
            "title": event["key"],
            "event": event,
            "state": _state(event["status"], event["is_pruned"]),
            "actions": actions,
            "timeline": timeline(event),
            "deliveries": [delivery_shown(each) for each in event["deliveries"]],
            "documents": [
                {
                    "name": name,
                    "shown": documents.as_html(event[name], find),
                    "url": self._address("document", event["id"], name),
                }
                for name in ("payload", "headers")
                if event[name] is not None and (event[name] or name == "payload")
            ],
            "history": self._address("history", event["id"]),
            **(extra_context or {}),
        }
        return self.answer(request, "event", context)

    @unless_too_slow
    def document_view(self, request: HttpRequest, object_id: str, name: str) -> HttpResponse:
        """Answer with a whole document, as text."""
        with in_time(using=alias()):
            event = self._event(request, object_id)
        if name not in ("payload", "headers") or event[name] is None:
            raise Http404
        headers = {
            "Content-Disposition": documents.file_name(event["key"], name),
            "X-Content-Type-Options": "nosniff",
        }
        text = documents.as_text(event[name])
        return HttpResponse(text, content_type="text/plain; charset=utf-8", headers=headers)

    def _event(self, request: HttpRequest, object_id: str) -> Row:
        if not self.has_view_permission(request):
            raise PermissionDenied
        event_id = searching.number(object_id)
        row = None if event_id is None else self.row(event_id)
        event = None if row is None else look.event(row["key"], using=alias())
        if event is None:
            raise Http404(_("There is no such event."))
        return event

    def _address(self, name: str, *args: object) -> str:
        view = f"admin:spark_outbox_outboxevent_{name}"
        return reverse(view, args=args, current_app=self.admin_site.name)


def _state(status: str, is_pruned: bool) -> str:
    label = str(EventStatus(status).label)
    return _("%(state)s, pruned") % {"state": label} if is_pruned else label


def delivery_shown(row: Row) -> Row:
    """Return a delivery with texts for its page."""
    name = _("all other handlers") if row["handler"] == EVERY_OTHER else row["handler"]
    return {
        **row,
        "name": name,
        "state": DeliveryStatus(row["status"]).label,
        "attempted": wording.time(row["attempted_at"]),
        "took": wording.duration(row["duration"]),
        "due": wording.time(row["available_at"]) if row["status"] == "pending" else "",
    }


def timeline(event: Row) -> list[dict[str, str]]:
    """Return what has happened to an event, and what is to come, in that order."""
    found = [(event["created_at"], _("emitted"), "")]
    if _is_due_apart(event):
        found.append((event["available_at"], _("due"), ""))
    for row in event["deliveries"]:
        if row["handler"] == EVERY_OTHER:
            continue
        delivery = delivery_shown(row)
        if row["attempts"] > 0:
            text = _("attempt %(number)d: %(state)s")
            found.append((row["attempted_at"], delivery["name"], _attempt(text, delivery)))
        if row["status"] == "pending" and row["available_at"] is not None:
            found.append((row["available_at"], delivery["name"], _("next attempt")))
    if event["finished_at"] is not None:
        found.append((event["finished_at"], str(EventStatus(event["status"]).label), ""))
    found.sort(key=lambda each: _moment(each[0]))
    return [{"when": wording.time(at), "what": what, "more": more} for at, what, more in found]


def _is_due_apart(event: Row) -> bool:
    """Return whether an event is or was delayed: not for a delivery's next attempt, nor past its end."""
    due, end = event["available_at"], event["finished_at"]
    if due is None or (end is not None and _moment(due) > _moment(end)):
        return False
    pending = (row for row in event["deliveries"] if row["status"] == "pending")
    return all(row["available_at"] != due for row in pending)


def _attempt(text: str, delivery: Row) -> str:
    said = text % {"number": delivery["attempts"], "state": delivery["state"]}
    if delivery["took"]:
        said += ", " + _("took %(duration)s") % {"duration": delivery["took"]}
    if delivery["worker"]:
        said += ", " + _("on worker %(worker)s") % {"worker": delivery["worker"]}
    return said


def _moment(text: str) -> timedelta:
    """Return a time that can be compared, also if Python does not know it."""
    try:
        moment = parse_datetime(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        return timedelta.min if text.startswith("-") or text.endswith("BC") else timedelta.max
    return moment - datetime.fromtimestamp(0, moment.tzinfo)
