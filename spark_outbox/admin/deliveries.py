"""Deliveries in the admin: the list, and the page of one."""

from typing import Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from spark_outbox.admin import searching
from spark_outbox.admin.base import LookingAdmin, unless_too_slow
from spark_outbox.admin.changelist import (
    DeliveryStateFilter,
    FingerprintFilter,
    GroupFilter,
    HandlerFilter,
)
from spark_outbox.admin.events import delivery_shown
from spark_outbox.dashboard.access import alias
from spark_outbox.dashboard.links import Links
from spark_outbox.models import Delivery, DeliveryStatus
from spark_outbox.operating import lists
from spark_outbox.operating.lists import Page
from spark_outbox.operating.patience import in_time
from spark_outbox.store.viewing import Row


def _column(name: str, label: Any) -> Any:
    """Return a column of the list, which shows this of the row that an instance was made of."""

    def column(_: Any, delivery: Any) -> str:
        return str(delivery.shown[name])

    return admin.display(column, description=label)


@admin.register(Delivery)
class DeliveryAdmin(LookingAdmin):
    list_display = ("of", "key", "group", "state", "tries", "problem", "attempted", "took", "by")
    list_filter = (DeliveryStateFilter, GroupFilter, HandlerFilter, FingerprintFilter)
    actions = None

    of = _column("name", gettext_lazy("handler"))
    key = _column("key", gettext_lazy("event"))
    group = _column("group", gettext_lazy("group"))
    state = _column("state", gettext_lazy("state"))
    tries = _column("attempts", gettext_lazy("attempts"))
    attempted = _column("attempted", gettext_lazy("last attempt"))
    took = _column("took", gettext_lazy("took"))
    by = _column("worker", gettext_lazy("worker"))
    problem = _column("error", gettext_lazy("error"))

    def page(self, request: HttpRequest) -> Page:
        wanted = searching.wanted(request.GET, states=DeliveryStatus.values)
        wanted = lists.with_key(wanted, using=alias())
        where = searching.place(request.GET)
        return lists.deliveries(wanted, where, size=self.list_per_page, using=alias())

    def instance(self, row: Row) -> Delivery:
        delivery: Any = Delivery(id=row["id"], event_id=row["event_id"], handler=row["handler"])
        delivery.shown = delivery_shown(row)
        return delivery  # type: ignore[no-any-return]

    def row(self, row_id: int) -> Row | None:
        return lists.delivery_by_id(row_id, using=alias())

    @unless_too_slow
    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        if not self.has_view_permission(request):
            raise PermissionDenied
        delivery_id = searching.number(object_id)
        with in_time(using=alias()):
            row = None if delivery_id is None else self.row(delivery_id)
        if row is None:
            raise Http404(_("There is no such delivery."))
        url = Links(request, self.admin_site).event(row["event_id"])
        delivery = delivery_shown(row)
        context = {"title": delivery["name"], "delivery": delivery, "url": url, **(extra_context or {})}
        return self.answer(request, "delivery", context)
