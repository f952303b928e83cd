"""Addresses of mails, and their domains."""

import re
from email import policy

from django.core.exceptions import ValidationError
from django.utils.encoding import punycode
from django.utils.translation import gettext as _

CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
"""Characters that no header may have, such as those of new lines."""


def check(text: str) -> None:
    """Raise ValidationError unless it is one address, perhaps with a name before it."""
    if domain(text) is None:
        raise ValidationError(_("This is no address."))


def domain(text: str) -> str | None:
    """Return the domain of an address in ASCII; None if it is not one address, or has no domain."""
    found = mailbox(text)
    return found and found.rpartition("@")[2]


def mailbox(text: str) -> str | None:
    """Return an address without its name, in lower case, with its domain in ASCII; None if it is not one
    address, or has no domain."""
    try:
        if re.search(f"[{CONTROLS}]", text):
            return None
        header = policy.default.header_factory("to", text)
        (group,) = header.groups
        (address,) = group.addresses
        is_plain = address.username and group.display_name is None and not header.defects
        if not is_plain or not address.domain:
            return None
        return f"{address.username}@{punycode(address.domain)}".lower()
    except Exception:  # noqa: BLE001, Python's parser raises many kinds of errors
        return None
