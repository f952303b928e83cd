"""From an event to one event for each recipient, and from that to a mail."""

import hashlib
import smtplib
from collections.abc import Callable, Mapping
from typing import Any

from django.core.mail import EmailMultiAlternatives
from django.utils import timezone, translation

from spark_outbox import Discard, Event
from spark_outbox.api import process_events
from spark_outbox.contrib.mails import GROUP, Addresses, addresses
from spark_outbox.contrib.mails.models import Mail, Rendered

LONGEST = 200
"""How many characters of an event's key are in the keys of its mails."""


def hand_out(event: Event, recipients: Callable[[Event], Addresses]) -> None:
    """Emit an event for each recipient. Raises Discard if there are some, but no mail for the group;
    and TypeError for what is no text."""
    if event.group == GROUP:  # the pattern of `recipients` is for all groups
        return
    found = recipients(event) or ()
    to = [found] if isinstance(found, str) else list(filter(None, found))
    for each in to:
        if not isinstance(each, str):
            raise TypeError(f"Recipients are text, not {type(each).__name__}: {each!r:.100}.")
    if to:
        find(event.group)
    process_events(_for_one(event, address) for address in to)


def _for_one(event: Event, address: str) -> dict[str, Any]:
    """Return the event of the mail to one recipient, which has the values of the other one."""
    address = address.strip()
    mailbox = addresses.mailbox(address) or address
    digest = hashlib.sha256(f"{event.key}\0{mailbox}".encode(errors="surrogatepass")).hexdigest()[:32]
    mail = {"to": address, "id": digest, "group": event.group, "key": event.key}
    key = f"{event.key[:LONGEST]}:{digest}"
    return {**event.payload, "group": GROUP, "key": key, "spark_mail": mail}


def find(group: str) -> Mail:
    """Return the mail about the events of a group. Raises Discard if there is none."""
    mail = Mail.objects.filter(event_group=group, is_active=True).first()
    if mail is None:
        raise Discard(f"There is no active mail for the group {group!r}.")
    return mail


def send(event: Event) -> None:
    """Send the mail to one recipient. Raises Discard if it can't reach that one, now or later."""
    about = event["spark_mail"]
    mail, to = find(about["group"]), about["to"]
    if addresses.domain(to) is None:
        raise Discard(f"{to!r:.200} is no address.")
    names = {"group": about["group"], "key": about["key"], "recipient": to}
    subject, body, html = render(mail, event.payload, names)
    message = EmailMultiAlternatives(subject, body, mail.from_email or None, [to])
    # Not the name of this machine: the next attempt may be on another.
    domain = addresses.domain(message.from_email) or "localhost"
    message.extra_headers["Message-ID"] = f"<{about['id']}@{domain}>"
    if html:
        message.attach_alternative(html, "text/html")
    try:
        sent = message.send()
    except smtplib.SMTPRecipientsRefused as error:
        code, text = next(iter(error.recipients.values()))
        if code < 500:
            raise
        raise Discard(f"The server refuses the recipient: {code} {text!r}") from error
    if sent == 0:  # as with `fail_silently`; a backend that returns None does not say
        raise RuntimeError("The mail backend has sent nothing, and has not said why.")


def render(
    mail: Mail, payload: Mapping[str, Any], names: Mapping[str, str], *, empty: set[str] | None = None
) -> Rendered:
    """Render a mail with the values of an event, and those of a `context`. That is done in the language
    and time zone of the settings, and not in those of somebody's request."""
    values = {**names, **payload}
    context = values.get("context")
    if isinstance(context, dict):
        values |= context
    with translation.override(None), timezone.override(None):
        translation.deactivate()  # which leads to that of the settings: None is no language at all
        return mail.render(values, empty=empty)
