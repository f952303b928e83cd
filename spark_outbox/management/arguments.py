"""The types of commands' arguments, and those that several commands have."""

import argparse
import re

from django.core.management.base import CommandParser
from django.db import DEFAULT_DB_ALIAS


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def add_common_arguments(parser: CommandParser, *, asks: bool = True) -> None:
    """Those of each command that people use to look at events, or to change them."""
    if asks:
        parser.add_argument("--yes", action="store_true", help="don't ask")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--database", default=DEFAULT_DB_ALIAS, metavar="ALIAS", help="default: %(default)s"
    )


def regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def duration(text: str) -> float:
    """Return the seconds of 30d, 12h, 90m or 1w."""
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS or not number.isdecimal() or not 0 < int(number) * UNITS[unit] < 10**10:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 30d, 12h or 90m")
    return float(int(number) * UNITS[unit])


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10**8:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def address(text: str) -> tuple[str, int]:
    """Return the host and port of 8080, 0.0.0.0:8080 or [::]:8080."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65_536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; write 8080, 0.0.0.0:8080 or [::]:8080")
    return host.strip("[]") or "127.0.0.1", int(port)
