"""Mails in the admin, with a preview against an event of the past."""

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.db import router, transaction
from django.http import Http404, HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.translation import gettext as _
from django.views.decorators.http import require_POST

from spark_outbox.contrib.mails.models import Mail
from spark_outbox.contrib.mails.sending import render
from spark_outbox.models import OutboxEvent

if TYPE_CHECKING:
    Base = admin.ModelAdmin[Mail]
else:
    Base = admin.ModelAdmin

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the HTML of a mail may do in its frame, which also runs no script: it loads nothing."""


@admin.register(Mail)
class MailAdmin(Base):
    list_display = ("event_group", "subject", "is_active")
    list_filter = ("is_active",)
    search_fields = ("event_group", "subject")
    ordering = ("event_group",)
    change_form_template = "spark_outbox/mails/change_form.html"

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(require_POST(self.preview_view))
        name = "spark_outbox_mails_mail_preview"
        own = [path("preview/", view, name=name), path("<path:object_id>/preview/", view, name=name)]
        return [*own, *super().get_urls()]

    def render_change_form(
        self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any
    ) -> HttpResponse:
        mail = context.get("original")
        if self._may_preview(request, mail):
            view = "admin:spark_outbox_mails_mail_preview"
            place = [] if mail is None else [mail.pk]
            context["preview_url"] = reverse(view, args=place, current_app=self.admin_site.name)
        return super().render_change_form(request, context, *args, **kwargs)

    def _may_preview(self, request: HttpRequest, mail: Mail | None) -> bool:
        """A preview shows what is in an event."""
        if not request.user.has_perm("spark_outbox.view_outboxevent"):
            return False
        if mail is None:
            return self.has_add_permission(request)
        return self.has_change_permission(request, mail)

    def preview_view(self, request: HttpRequest, object_id: str | None = None) -> HttpResponse:
        """Answer with the mail as it is in the form, which is not saved."""
        mail = None if object_id is None else self.get_object(request, unquote(object_id))
        if object_id is not None and mail is None:
            raise Http404
        if not self._may_preview(request, mail):
            raise PermissionDenied
        form = self.get_form(request, mail, change=mail is not None)(request.POST, instance=mail)
        shown = preview(form.instance, request.POST.get("preview_key", "")) if form.is_valid() else {}
        request.current_app = self.admin_site.name
        common = {**self.admin_site.each_context(request), "opts": self.opts, "title": _("Preview")}
        return TemplateResponse(
            request, "spark_outbox/mails/preview.html", {**common, "form": form, **shown}
        )


def preview(mail: Mail, key: str) -> dict[str, Any]:
    """Render a mail about the event with this key, or else the latest of its group. What the template
    has the values of the event do to the database is rolled back."""
    empty: set[str] = set()
    alias = router.db_for_write(OutboxEvent)
    try:
        with transaction.atomic(using=alias):
            event = OutboxEvent.objects.past(mail.event_group, key.strip())
            if event is None:
                return {"problem": _("There is no such event in this group, or it can't be shown.")}
            names = {"group": event.group, "key": event.key, "recipient": "anna@example.com"}
            rendered = render(mail, event.payload, names, empty=empty)
            transaction.set_rollback(True, using=alias)
    except Exception as error:  # noqa: BLE001, templates call what they like
        return {"problem": f"{type(error).__name__}: {error}"}
    html = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{rendered.html}'
    return {
        "event": event,
        "rendered": rendered,
        "framed": html if rendered.html else "",
        "empty": sorted(empty),
    }
