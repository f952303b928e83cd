"""The mails, as people write them."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from django.core.exceptions import ValidationError
from django.db import models
from django.utils.translation import gettext_lazy as _

from spark_outbox.contrib.mails import addresses, templating

CHECKS = {
    "from_email": addresses.check,
    "subject": templating.check,
    "body": templating.check,
    "html": templating.check,
}


class Rendered(NamedTuple):
    subject: str
    body: str
    html: str


class Mail(models.Model):
    """The mail about the events of a group."""

    event_group = models.CharField(
        _("event group"), max_length=255, unique=True, help_text=_("The whole name, not a pattern.")
    )
    is_active = models.BooleanField(
        _("active"), default=True, help_text=_("A mail that is not active is not sent.")
    )
    from_email = models.CharField(
        _("sender"),
        max_length=255,
        blank=True,
        help_text=_("If it is empty, it is DEFAULT_FROM_EMAIL of the settings."),
    )
    subject = models.CharField(
        _("subject"),
        max_length=255,
        help_text=_(
            "Subject, text and HTML are Django templates. Their variables are the values of the event, "
            "and group, key and recipient."
        ),
    )
    body = models.TextField(_("text"))
    html = models.TextField(
        _("HTML"),
        blank=True,
        help_text=_("Mail programs show it in place of the text, if they can."),
    )

    class Meta:
        db_table = "spark_outbox_mail"
        verbose_name = _("mail")
        verbose_name_plural = _("mails")

    def __str__(self) -> str:
        return self.event_group

    def clean(self) -> None:
        errors = {}
        for name, check in CHECKS.items():
            value = getattr(self, name)
            try:
                if value:
                    check(value)
            except ValidationError as error:
                errors[name] = error
        if errors:
            raise ValidationError(errors)

    def render(self, values: Mapping[str, Any], *, empty: set[str] | None = None) -> Rendered:
        """Render its parts. Variables that they show, and that are empty, are added to `empty`."""
        subject = templating.render(self.subject, values, empty=empty)
        return Rendered(
            re.sub(rf"[\s{addresses.CONTROLS}]+", " ", subject),  # a newline would begin another header
            templating.render(self.body, values, empty=empty),
            templating.render(self.html, values, engine=templating.HTML, empty=empty),
        )
