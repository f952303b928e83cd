"""Generators in the admin: the list, the page of one with its conditions, and the preview."""

from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import admin
from django.core.exceptions import PermissionDenied, ValidationError
from django.db.models import Exists, OuterRef, QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import mark_safe
from django.utils.text import capfirst
from django.utils.translation import gettext, gettext_lazy

from spark_outbox.contrib.generators.conditions import KINDS
from spark_outbox.contrib.generators.definitions import SOURCES
from spark_outbox.contrib.generators.models import Condition, Generator, clashing
from spark_outbox.contrib.generators.preview import preview
from spark_outbox.contrib.generators.rules import Rule

if TYPE_CHECKING:
    Admin = admin.ModelAdmin[Generator]
    Inline = admin.TabularInline[Condition, Generator]
else:
    Admin, Inline = admin.ModelAdmin, admin.TabularInline


class ConditionInline(Inline):
    model = Condition
    extra = 0

    def get_formset(self, request: HttpRequest, obj: Generator | None = None, **kwargs: Any) -> Any:
        """Offer the variables of the source; and those that are stored, as they may be gone."""
        declared = SOURCES[obj.source].variables if obj and obj.source in SOURCES else {}
        stored = obj.conditions.values_list("variable", flat=True) if obj else ()
        choices = [(name, name) for name in ["", *dict.fromkeys([*declared, *stored])]]
        widgets = {"variable": forms.Select(choices=choices)}
        return super().get_formset(request, obj, widgets=widgets, **kwargs)


@admin.register(Generator)
class GeneratorAdmin(Admin):
    """A generator is added in two steps: its conditions follow on its page, where it is activated."""

    inlines = (ConditionInline,)
    list_display = ("group", "source_name", "conditions_text", "is_active", "problems")
    list_editable = ("is_active",)
    list_filter = ("is_active", "source")
    list_per_page = 50
    ordering = ("source", "group", "pk")
    search_fields = ("group",)
    show_full_result_count = False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Generator]:
        others = clashing(OuterRef("group"), OuterRef("source"))
        found = super().get_queryset(request).prefetch_related("conditions")
        return found.annotate(is_clashing=Exists(others))

    def get_list_display(self, request: HttpRequest) -> Any:
        return [*self.list_display, *self._preview(request)]

    def get_fields(self, request: HttpRequest, obj: Generator | None = None) -> Any:
        if obj is None:
            return ["group", "source"]
        return ["group", "source_name", "is_active", "variables", "problems", *self._preview(request)]

    def get_readonly_fields(self, request: HttpRequest, obj: Generator | None = None) -> list[str]:
        return [name for name in self.get_fields(request, obj) if hasattr(self, name)]

    def get_inlines(self, request: HttpRequest, obj: Generator | None) -> Any:
        return () if obj is None else self.inlines

    def formfield_for_dbfield(self, db_field: Any, request: Any, **kwargs: Any) -> Any:
        if db_field.name == "source":
            names = sorted((str(each.verbose_name), name) for name, each in SOURCES.items())
            choices = [("", "---------"), *((name, verbose) for verbose, name in names)]
            return forms.ChoiceField(label=capfirst(db_field.verbose_name), choices=choices)
        return super().formfield_for_dbfield(db_field, request, **kwargs)

    def response_add(self, request: Any, obj: Generator, post_url_continue: str | None = None) -> Any:
        """Go on to its page, whichever button it was; if that may be seen."""
        if "_addanother" not in request.POST and self.has_view_permission(request, obj):
            request.POST = request.POST.copy()
            request.POST["_continue"] = "1"
        return super().response_add(request, obj, post_url_continue)

    # Columns and fields

    @admin.display(description=gettext_lazy("source"), ordering="source")
    def source_name(self, generator: Generator) -> str:
        definition = SOURCES.get(generator.source)
        return capfirst(str(definition.verbose_name)) if definition else generator.source

    @admin.display(description=gettext_lazy("conditions"))
    def conditions_text(self, generator: Generator) -> str:
        return gettext(" and ").join(map(str, generator.conditions.all()))

    @admin.display(description=gettext_lazy("problems"))
    def problems(self, generator: Generator) -> str:
        try:
            if getattr(generator, "is_clashing", False):  # rarely: that takes a query
                generator.rule(())
            Rule.of(generator.group, generator.source, generator.conditions.all())
        except ValidationError as error:
            return " ".join(error.messages)
        return ""

    @admin.display(description=gettext_lazy("variables"))
    def variables(self, generator: Generator) -> str:
        definition = SOURCES.get(generator.source)
        rows = definition.variables.items() if definition else ()
        return format_html_join(
            mark_safe("<br>"),
            "<strong>{}</strong> ({}) {}",
            ((name, KINDS[each.type].name, each.description) for name, each in rows),
        )

    @admin.display(description=gettext_lazy("preview"))
    def preview_link(self, generator: Generator) -> str:
        name = "admin:spark_outbox_generators_generator_preview"
        url = reverse(name, args=[generator.pk], current_app=self.admin_site.name)
        return format_html('<a href="{}">{}</a>', url, gettext("What it would emit now"))

    # The preview

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.preview_view)
        name = "spark_outbox_generators_generator_preview"
        return [path("<path:object_id>/preview/", view, name=name), *super().get_urls()]

    def preview_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        generator = self.get_object(request, object_id)
        if not (self._preview(request) and self.has_view_permission(request, generator)):
            raise PermissionDenied
        if generator is None:
            raise Http404
        request.current_app = self.admin_site.name
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": gettext("Preview of %(generator)s") % {"generator": generator},
            "generator": generator,
            "preview": preview(generator),
        }
        return TemplateResponse(request, "spark_outbox_generators/preview.html", context)

    def _preview(self, request: HttpRequest) -> list[str]:
        """Return the link to the preview as a list, which is empty for who may not see that."""
        may = request.user.has_perm("spark_outbox_generators.preview_generator")
        return ["preview_link"] if may else []
