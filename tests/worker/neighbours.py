"""Events before and after the one whose key is `bad`, to which nothing must happen."""

from tests.tools import statuses

KEYS = ["before", "bad", "after 1", "after 2"]
OTHERS_DONE = {"before": "done", "after 1": "done", "after 2": "done"}


def others() -> dict[str, str]:
    """Return the statuses of those that are not `bad`."""
    return {key: status for key, status in statuses().items() if key in KEYS and key != "bad"}
