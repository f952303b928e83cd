"""Lists of the admin that read a bounded number of rows, and their filters.

Django's own would count all rows, skip those of former pages, and look for what to filter by through the
whole table.
"""

from typing import TYPE_CHECKING, Any

from django.contrib.admin import SimpleListFilter
from django.contrib.admin.views.main import ChangeList
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from spark_outbox.admin import searching
from spark_outbox.dashboard import wording
from spark_outbox.dashboard.access import alias
from spark_outbox.models import DeliveryStatus, EventStatus
from spark_outbox.operating import lists
from spark_outbox.operating.lists import Page
from spark_outbox.registry.handlers import registry

if TYPE_CHECKING:
    from spark_outbox.admin.base import LookingAdmin


class PagedList(ChangeList):
    """A list that goes on from an id. The queryset that Django builds is never run."""

    model_admin: "LookingAdmin"

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> QuerySet[Model]:
        for name in searching.PLACES:  # filters and searches begin with the first page
            self.params.pop(name, None)
            self.filter_params.pop(name, None)
        return super().get_queryset(request, exclude_parameters)

    def get_results(self, request: HttpRequest) -> None:
        page = self.model_admin.page(request)
        self.result_list: Any = [self.model_admin.instance(row) for row in page.rows]
        # Django offers to select all that were found if they are more than the page shows.
        self.result_count = len(page.rows) if page.number is None else page.number
        self.full_result_count = self.result_count
        self.show_full_result_count = False
        self.show_admin_actions = True
        self.can_show_all = False
        self.multi_page = False
        self.older = self._link("before", page.older)
        self.newer = self._link("after", page.newer)
        self.summary = self._summary(page)

    def _link(self, name: str, place: int | None) -> str:
        return "" if place is None else self.get_query_string({name: place})

    def _summary(self, page: Page) -> str:
        if page.number is None:
            return self._of_all(page)
        found = ngettext("%(number)s found.", "%(number)s found.", page.number)
        text = found % {"number": wording.number(page.number)}
        if not page.looked_at:
            return text
        more = _("Only %(number)s were looked at, and there may be others: narrow the search.")
        return f"{text} {more % {'number': wording.number(page.looked_at)}}"

    def _of_all(self, page: Page) -> str:
        if page.older is None and page.newer is None:
            return _("These are all.") if page.rows else ""
        number = lists.estimate(self.opts.db_table, using=alias())
        return _("About %(number)s in all.") % {"number": wording.number(number)} if number > 0 else ""


class _Filter(SimpleListFilter):
    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset

    def choice(self, names: list[str]) -> list[tuple[str, str]]:
        """Return what to choose from, with what is chosen."""
        chosen = self.used_parameters.get(self.parameter_name or "")
        if chosen and chosen not in names:
            names = [chosen, *names]
        return [(name, name) for name in names]


class EventStateFilter(_Filter):
    title = gettext_lazy("state")
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return list(EventStatus.choices)


class DeliveryStateFilter(_Filter):
    title = gettext_lazy("state")
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return list(DeliveryStatus.choices)


class GroupFilter(_Filter):
    """The groups that are stored, up to a number."""

    title = gettext_lazy("group")
    parameter_name = "group"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return self.choice(lists.groups(using=alias()))


class HandlerFilter(_Filter):
    """The handlers of this process's code."""

    title = gettext_lazy("handler that fails or runs")
    parameter_name = "handler"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return self.choice(sorted(handler.name for handler in registry.handlers))


class FingerprintFilter(_Filter):
    """The kind of error that a link asks for: the filter is there to take it away again."""

    title = gettext_lazy("kind of error")
    parameter_name = "fingerprint"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        chosen = self.used_parameters.get(self.parameter_name)
        return [] if chosen is None else [(chosen, chosen or "-")]
