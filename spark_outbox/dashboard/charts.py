"""How many events come and go, as SVG: bars for those emitted, a line for those done. Places and sizes
are attributes, so that no style is inline; templates/spark_outbox/dashboard/chart.html has the rest."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from django.utils.translation import ngettext

from spark_outbox.dashboard import wording
from spark_outbox.operating.glance import Flow

WIDTH, HEIGHT = 600, 120


class Bar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    is_estimate: bool


def chart(flows: Sequence[Flow], *, unit: str) -> dict[str, Any]:
    """Return what the template shows of these, the latest first; `unit` is `minute` or `hour`."""
    most = max((max(flow.arrived, flow.done) for flow in flows), default=0)
    scale = (HEIGHT - 4) / max(most, 1)
    slot = WIDTH / max(len(flows), 1)
    bars, points = [], []
    for place, flow in enumerate(reversed(flows)):
        height = round(flow.arrived * scale, 1)
        bar = Bar(
            round(place * slot + slot * 0.1, 1),
            round(HEIGHT - height, 1),
            round(slot * 0.8, 1),
            height,
            flow.is_estimate,
        )
        bars.append(bar)
        points.append(f"{(place + 0.5) * slot:.1f},{HEIGHT - flow.done * scale:.1f}")
    return {
        "unit": unit,
        "width": WIDTH,
        "height": HEIGHT,
        "bars": bars,
        "points": " ".join(points),
        "most": wording.number(most),
        "arrived": wording.number(sum(flow.arrived for flow in flows)),
        "done": wording.number(sum(flow.done for flow in flows)),
        "has_estimate": any(flow.is_estimate for flow in flows),
        "rows": [
            {
                "when": _when(place, unit),
                "arrived": wording.number(flow.arrived),
                "done": wording.number(flow.done),
                "is_estimate": flow.is_estimate,
            }
            for place, flow in enumerate(flows)
            if flow.arrived or flow.done
        ],
    }


def _when(place: int, unit: str) -> str:
    if unit == "hour":
        text = ngettext("%(number)d hour ago", "%(number)d hours ago", place)
    else:
        text = ngettext("%(number)d minute ago", "%(number)d minutes ago", place)
    return text % {"number": place}
