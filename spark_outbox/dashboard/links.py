"""Addresses of the dashboard's pages, and of the admin's pages of events for users who may see them."""

from urllib.parse import urlencode

from django.contrib.admin import AdminSite
from django.http import HttpRequest
from django.urls import NoReverseMatch, reverse

from spark_outbox.store.triaging import Kind


class Links:
    def __init__(self, request: HttpRequest, site: AdminSite) -> None:
        self._site = site.name
        self._user = request.user

    def page(self, name: str, **query: str) -> str:
        """Return the address of a page of the dashboard."""
        url = reverse(f"admin:spark_outbox_dashboard_{name}", current_app=self._site)
        return f"{url}?{urlencode(query)}" if query else url

    def of_kind(self, name: str, kind: Kind) -> str:
        return self.page(name, **kind._asdict())

    def event(self, event_id: int) -> str:
        """Return the address of an event; "" if there is no such page, or not for this user."""
        return self._of_events("change", event_id)

    def events(self, **query: str) -> str:
        """Return likewise that of the list of events."""
        url = self._of_events("changelist")
        return f"{url}?{urlencode(query)}" if url else ""

    def _of_events(self, name: str, *args: object) -> str:
        if not self._user.has_perm("spark_outbox.view_outboxevent"):
            return ""
        try:
            return reverse(f"admin:spark_outbox_outboxevent_{name}", args=args, current_app=self._site)
        except NoReverseMatch:
            return ""
