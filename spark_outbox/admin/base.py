"""What the pages of events and those of deliveries have: they show, and change nothing."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from django.contrib import admin
from django.contrib.admin import ShowFacets
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.template.response import TemplateResponse
from django.utils.text import capfirst
from django.utils.translation import gettext as _

from spark_outbox.admin.searching import HELP, number
from spark_outbox.dashboard.access import alias
from spark_outbox.operating.lists import Page
from spark_outbox.operating.patience import TooSlow, in_time
from spark_outbox.store.viewing import Row

if TYPE_CHECKING:
    Base = admin.ModelAdmin[Any]
else:
    Base = admin.ModelAdmin


View = TypeVar("View", bound=Callable[..., HttpResponseBase])


def unless_too_slow(view: View) -> View:
    """Have a view of LookingAdmin answer with a sentence if the database does not, in time."""

    @wraps(view)
    def answer(admin: "LookingAdmin", *arguments: Any, **options: Any) -> HttpResponseBase:
        try:
            return view(admin, *arguments, **options)
        except TooSlow:
            return admin.too_slow(arguments[0])

    return cast("View", answer)


class LookingAdmin(Base):
    change_list_template = "spark_outbox/admin/list.html"
    list_per_page = 50
    ordering = ("-id",)
    sortable_by = ()
    search_fields = ("key",)
    search_help_text = HELP
    show_full_result_count = False
    show_facets = ShowFacets.NEVER

    @abstractmethod
    def page(self, request: HttpRequest) -> Page:
        """Return the rows of the page of the list that is asked for."""

    @abstractmethod
    def instance(self, row: Row) -> Model:
        """Return a row of a list as an instance of the model, which is not saved."""

    @abstractmethod
    def row(self, row_id: int) -> Row | None:
        """Return one row."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        """Return the instance that Django's page of the history is about."""
        row_id = number(object_id)
        row = None if row_id is None else self.row(row_id)
        return None if row is None else self.instance(row)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        return queryset.none(), False  # the list has its rows from `page`, and autocomplete none

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[Any]:
        from spark_outbox.admin.changelist import PagedList

        return PagedList

    @unless_too_slow
    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        title = {"title": capfirst(self.opts.verbose_name_plural)}
        with in_time(using=alias()):
            return super().changelist_view(request, {**title, **(extra_context or {})})

    def too_slow(self, request: HttpRequest) -> HttpResponse:
        problem = _("The database did not answer in time. Narrow the filter, or try again later.")
        return self.answer(request, "problem", {"title": _("Too slow"), "problem": problem})

    def answer(
        self, request: HttpRequest, template: str, context: Mapping[str, Any], *, status: int = 200
    ) -> TemplateResponse:
        request.current_app = self.admin_site.name
        common = {**self.admin_site.each_context(request), "opts": self.opts}
        name = f"spark_outbox/admin/{template}.html"
        return TemplateResponse(request, name, {**common, **context}, status=status)
