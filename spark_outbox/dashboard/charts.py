"""How many events come and go, as SVG: bars for those emitted, a line for those done. Places and sizes
are attributes, so that no style is inline; templates/spark_outbox/dashboard/chart.html has the rest."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from spark_outbox.dashboard import wording
from spark_outbox.operating.glance import Flow
from spark_outbox.store.flowing import SAMPLE

WIDTH, HEIGHT = 600, 120
TOP = 1
"""The grid's line of the most events, which must not be cut in half."""


class Bar(NamedTuple):
    """Places and sizes as text, which no locale writes with a comma."""

    x: str
    y: str
    width: str
    height: str


def chart(flows: Sequence[Flow], *, unit: str) -> dict[str, Any]:
    """Return what the template shows of these, the latest first; `unit` is `minute` or `hour`."""
    most = max((max(flow.arrived, flow.done) for flow in flows), default=0)
    scale = (HEIGHT - TOP) / max(most, 1)
    width = WIDTH / max(len(flows), 1)
    slots = [
        {
            "when": _when(place, unit),
            "x": f"{WIDTH - (place + 1) * width:.1f}",
            "width": f"{width:.1f}",
            "bar": _bar(WIDTH - (place + 1) * width, width, flow.arrived * scale),
            "arrived": wording.number(flow.arrived),
            "done": wording.number(flow.done),
            "is_estimate": flow.is_estimate,
            "is_empty": not (flow.arrived or flow.done),
        }
        for place, flow in enumerate(flows)
    ]
    points = [
        f"{WIDTH - (place + 0.5) * width:.1f},{HEIGHT - flow.done * scale:.1f}"
        for place, flow in enumerate(flows)
    ]
    return {
        "unit": unit,
        "width": str(WIDTH),
        "height": str(HEIGHT),
        "grid": [str(TOP), f"{(HEIGHT + TOP) / 2:.1f}"],
        "slots": slots,
        "points": " ".join(points),
        "most": wording.number(most),
        "arrived": wording.number(sum(flow.arrived for flow in flows)),
        "done": wording.number(sum(flow.done for flow in flows)),
        "has_estimate": any(flow.is_estimate for flow in flows),
        "counted": wording.number(SAMPLE),
        "rows": [slot for slot in slots if not slot["is_empty"]],
    }


def _bar(x: float, width: float, height: float) -> Bar | None:
    if not height:
        return None
    numbers = (x + width * 0.12, HEIGHT - height, width * 0.76, height)
    return Bar(*(f"{number:.1f}" for number in numbers))


def _when(place: int, unit: str) -> str:
    """Return how long ago the minute or the hour ended."""
    if not place:
        return _("until now")
    if unit == "hour":
        text = ngettext("until %(number)d hour ago", "until %(number)d hours ago", place)
    else:
        text = ngettext("until %(number)d minute ago", "until %(number)d minutes ago", place)
    return text % {"number": place}
