"""A client of a project's views, some of whose requests fail after all of the view's work."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from django.db import OperationalError
from django.db.transaction import TransactionManagementError
from django.http import HttpRequest, HttpResponseBase
from django.test import Client
from django.test.client import ClientHandler

NAMES = ("anna", "bert")
"""Of the processes that send requests."""


class Doomed(Exception):
    """The request was to fail."""


class DoomingHandler(ClientHandler):
    """Has doomed views fail at their very end, within the transaction of ATOMIC_REQUESTS."""

    def make_view_atomic(self, view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
        @functools.wraps(view)
        def doomed(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            response = view(request, *args, **kwargs)
            if "X-Doomed" in request.headers:
                raise Doomed
            return response

        return super().make_view_atomic(doomed)


class Driver:
    """Sends requests, and counts what came of them."""

    def __init__(self) -> None:
        self.client = Client(raise_request_exception=False)
        self.client.handler = DoomingHandler(enforce_csrf_checks=False)
        self.counts: Counter[str] = Counter()

    def get(self, path: str) -> None:
        response = self.client.get(path, follow=True)
        assert response.status_code == 200, (path, response.status_code)

    def post(self, path: str, data: dict[str, Any] | None = None, *, doomed: bool = False) -> bool:
        """Post a form; return whether it was saved. It was not if it is doomed, or met a deadlock or a
        race of the project's own."""
        response: Any = self.client.post(path, data, headers={"X-Doomed": "1"} if doomed else None)
        if response.status_code == 302 and not doomed:
            return True
        assert response.status_code == 500, (path, response.status_code, errors(response))
        error = response.exc_info[1]
        if not isinstance(error, Doomed):
            # Wagtail passes over a deadlock of its search index, and Oscar over a race of its counters,
            # until the next query.
            assert isinstance(error, TransactionManagementError | OperationalError), error
            self.counts["rolled back unasked"] += 1
        return False

    def insist(self, path: str, data: dict[str, Any]) -> None:
        """Post a form until it is saved."""
        assert any(self.post(path, data) for _ in range(10))

    def print_counts(self) -> None:
        """For the test, which reads the last line."""
        print(json.dumps(self.counts))


def errors(response: Any) -> Any:
    """Return why a form was refused."""
    form = response.context.get("form") if response.context else None
    return form.errors if form is not None else None
