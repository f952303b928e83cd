"""What a strict project sends with each page; the tests in a browser fail on what it refuses."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse


def policy(get_response: Callable[[HttpRequest], HttpResponse]) -> Callable[[HttpRequest], HttpResponse]:
    def answer(request: HttpRequest) -> HttpResponse:
        response = get_response(request)
        response["Content-Security-Policy"] = "default-src 'self'"
        return response

    return answer
