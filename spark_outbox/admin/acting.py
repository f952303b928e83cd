"""What can be done to events: retry, discard, replay and rehearse.

Each has a permission of its own. A page says what would be done to how many events, and asks; its form
names the events. They are taken in chunks, each of which is a transaction with its entries in the log.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.contrib import messages
from django.contrib.admin.models import LogEntry
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from spark_outbox.admin.asking import ACTIONS, Action, Asked
from spark_outbox.admin.searching import number
from spark_outbox.dashboard import wording
from spark_outbox.dashboard.access import alias, entry, may
from spark_outbox.models import EventStatus
from spark_outbox.operating import lists, patience, repair, replay
from spark_outbox.operating.patience import TooSlow, in_time
from spark_outbox.operating.replay import MOST_STATEMENTS, Rehearsal
from spark_outbox.registry.handlers import registry
from spark_outbox.store.viewing import LOOKED_AT, Row

if TYPE_CHECKING:
    from spark_outbox.admin.events import EventAdmin

REHEARSED = 20
"""How many events are rehearsed at the most: the request waits for it."""

EXAMPLES = 20

NOTICES = 10


def address(admin: "EventAdmin", action: Action, event_id: int | None = None) -> str:
    name = f"admin:spark_outbox_outboxevent_{action.name}"
    url = reverse(name, current_app=admin.admin_site.name)
    return url if event_id is None else f"{url}?ids={event_id}"


def possible(*, using: str) -> set[str]:
    """Return what can be done here, by the role that the database knows this session by."""
    if not repair.is_possible(using=using):
        return set()
    return set(ACTIONS) if replay.can_rehearse(using=using) else set(ACTIONS) - {"rehearse"}


def back(admin: "EventAdmin", query: str = "") -> HttpResponse:
    """Go back to the list."""
    name = "admin:spark_outbox_outboxevent_changelist"
    url = reverse(name, current_app=admin.admin_site.name)
    return HttpResponseRedirect(f"{url}?{query}" if query else url)


# The page that asks


def choose(
    admin: "EventAdmin", request: HttpRequest, action: Action, chosen: Callable[[], list[int]]
) -> HttpResponse:
    """Ask about the events that were selected in the list."""
    with _allowed(admin, request, action) as refused:
        if refused:
            return refused
        ids = chosen()
        events = lists.events_by_id(ids, using=alias())
    query = request.GET.urlencode()
    if not events:
        messages.warning(request, _("Select events first."))
        return back(admin, query)
    return _ask(admin, request, Asked(action, events, query))


def act(admin: "EventAdmin", request: HttpRequest, action: Action) -> HttpResponse:
    """Ask, or do what is asked for by POST."""
    given = request.POST if request.method == "POST" else request.GET
    ids = {found for text in given.get("ids", "").split(",") if (found := number(text)) is not None}
    with _allowed(admin, request, action) as refused:
        if refused:
            return refused
        events = lists.events_by_id(sorted(ids)[:LOOKED_AT], using=alias())
    named = [handler for handler in registry.handlers if handler.name == given.get("handler")]
    asked = Asked(
        action,
        events,
        back=given.get("back", ""),
        handler=named[0] if named and action.has_handler else None,
        why=given.get("why", "").replace("\x00", "").strip()[:300],
    )
    if request.method != "POST":
        return _ask(admin, request, asked)
    if asked.problem or not asked.fitting:
        return _ask(admin, request, asked, problem=asked.problem)
    if action.name == "rehearse":
        return _rehearse(admin, request, asked)
    _change(request, asked)
    if len(events) == 1:
        name = "admin:spark_outbox_outboxevent_change"
        url = reverse(name, args=[events[0]["id"]], current_app=admin.admin_site.name)
        return HttpResponseRedirect(url)
    return back(admin, asked.back)


@contextmanager
def _allowed(admin: "EventAdmin", request: HttpRequest, action: Action) -> Iterator[HttpResponse | None]:
    """Look something up in time, for a user who may do this; yield a refusal if nobody can here."""
    if not may(request, action.name):
        raise PermissionDenied
    with in_time(using=alias()):
        if action.name in possible(using=alias()):
            yield None
        else:
            problem = _("This database can only be read here.")
            if repair.is_possible(using=alias()):
                problem = _("The role of this database connection may not read payloads.")
            context = {"title": action.label, "problem": problem}
            yield admin.answer(request, "problem", context, status=403)


def _ask(admin: "EventAdmin", request: HttpRequest, asked: Asked, problem: str = "") -> HttpResponse:
    fitting = asked.fitting
    ids = {event["id"] for event in fitting}
    others = [event for event in asked.events if event["id"] not in ids]
    states = Counter(
        "pruned" if event["is_pruned"] else str(EventStatus(event["status"]).label) for event in others
    )
    context = {
        "title": asked.action.label,
        "action": asked.action,
        "url": address(admin, asked.action),
        "ids": ",".join(map(str, sorted(ids))),
        "number": len(fitting),
        "number_text": wording.number(len(fitting)),
        "examples": fitting[:EXAMPLES],
        "more": wording.number(len(fitting) - EXAMPLES) if len(fitting) > EXAMPLES else "",
        "others": len(others),
        "states": [f"{state}: {wording.number(count)}" for state, count in states.items()],
        "handlers": [handler.name for handler in asked.handlers] if asked.action.has_handler else [],
        "handler": asked.handler.name if asked.handler else "",
        "why": asked.why,
        "back": asked.back,
        "most": REHEARSED,
        "problem": problem,
    }
    return admin.answer(request, "confirm", context)


# Doing it


def _change(request: HttpRequest, asked: Asked) -> None:
    """Take the events in chunks, and say what came of it."""
    ids = [event["id"] for event in asked.fitting]
    by_key = {event["key"]: event for event in asked.fitting}
    changed, notices = 0, list[str]()
    try:
        for start in range(0, len(ids), repair.CHUNK_SIZE):
            chunk = ids[start : start + repair.CHUNK_SIZE]
            with in_time(using=alias()):
                keys, said = _change_some(request, asked, chunk)
                _log(request, [by_key[key] for key in keys], _entry(asked))
            changed += len(keys)
            notices += said
    except TooSlow:
        messages.error(request, _("The database did not answer in time: the others are left alone."))
    for notice in notices[:NOTICES]:
        messages.warning(request, notice)
    text = {
        "retry": ngettext("%(number)s event is retried.", "%(number)s events are retried.", changed),
        "discard": ngettext(
            "%(number)s event is discarded.", "%(number)s events are discarded.", changed
        ),
        "replay": ngettext("%(number)s event is replayed.", "%(number)s events are replayed.", changed),
    }[asked.action.name]
    done = text % {"number": wording.number(changed)}
    if left_out := len(asked.events) - changed:
        others = ngettext("%(number)s was left out.", "%(number)s were left out.", left_out)
        done += " " + others % {"number": wording.number(left_out)}
    messages.add_message(request, messages.SUCCESS if changed else messages.WARNING, done)


def _change_some(request: HttpRequest, asked: Asked, ids: list[int]) -> tuple[list[str], list[str]]:
    if asked.action.name == "retry":
        return repair.retry_ids(ids, using=alias())
    if asked.action.name == "discard":
        reason = f"{request.user.get_username()}: {asked.why}"
        return repair.discard_ids(ids, reason, using=alias())
    if asked.handler is None:
        raise PermissionDenied
    done = set(replay.replay_ids(asked.handler, ids, using=alias()))
    return [event["key"] for event in asked.fitting if event["id"] in done], []


def _entry(asked: Asked) -> str:
    """Return what the log says of an event."""
    name = asked.handler.name if asked.handler else ""
    return {
        "retry": _("Retried."),
        "discard": _("Discarded: %(why)s") % {"why": asked.why},
        "replay": _("Replayed to %(handler)s.") % {"handler": name},
        "rehearse": _("Rehearsed with %(handler)s.") % {"handler": name},
    }[asked.action.name]


def _log(request: HttpRequest, events: list[Row], message: str) -> None:
    LogEntry.objects.bulk_create(
        entry(request, event["key"], message, event_id=event["id"]) for event in events
    )


def _rehearse(admin: "EventAdmin", request: HttpRequest, asked: Asked) -> HttpResponse:
    events = asked.fitting[:REHEARSED]
    if asked.handler is None:
        raise PermissionDenied
    ids = [event["id"] for event in events]
    _log(request, events, _entry(asked))  # first: its mails are real, and it may end this process
    limit = patience.MILLISECONDS
    done = replay.rehearse_ids(asked.handler, ids, milliseconds=limit, using=alias())
    return admin.answer(request, "rehearsed", _rehearsed(asked, done))


def _rehearsed(asked: Asked, done: Rehearsal) -> dict[str, Any]:
    return {
        "title": _("Rehearsal"),
        "handler": asked.handler.name if asked.handler else "",
        "events": done.events,
        "failures": done.failures,
        "failed": len(done.failures),
        "queries": done.queries,
        "rows": list(done.rows.items()),
        "statements": done.statements,
        "is_cut": done.queries > MOST_STATEMENTS,
        "left_out": len(asked.events) - done.events,
        "back": asked.back,
    }
