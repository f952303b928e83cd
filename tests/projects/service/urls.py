"""The views. Each has its own way to emit; a doomed one fails at its end."""

from collections.abc import AsyncIterator
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from django.db import transaction
from django.http import HttpRequest
from django.urls import path
from ninja import NinjaAPI

from spark_outbox import aemit, aemit_many, emit
from tests.projects.service.models import Note

api = NinjaAPI()


class Doomed(Exception):
    """The request was to fail."""


@transaction.atomic
def write_note(name: str, doomed: bool) -> None:
    note = Note.objects.create(name=name)
    emit("noted", f"noted_{name}", about=note)
    if doomed:
        raise Doomed


@api.post("/note/{name}")
async def note(request: HttpRequest, name: str, doomed: bool = False) -> None:
    """A row and its event in one transaction, from an async view."""
    await sync_to_async(write_note)(name, doomed)


@api.post("/bridge/{name}")
@transaction.atomic
def bridge(request: HttpRequest, name: str, doomed: bool = False) -> None:
    """Async code in a view that is not async: its transaction spans the awaits."""

    async def write() -> None:
        note = await Note.objects.acreate(name=name)
        await aemit("noted", f"noted_{name}", about=note)

    async_to_sync(write)()
    if doomed:
        raise Doomed


@api.post("/ping/{name}")
async def ping(request: HttpRequest, name: str, doomed: bool = False) -> None:
    """An event that no row belongs to. It is committed before the view fails."""
    await aemit("pinged", f"pinged_{name}", about=name)
    if doomed:
        raise Doomed


@api.post("/pings/{name}")
async def pings(request: HttpRequest, name: str, doomed: bool = False) -> None:
    """Several, which one statement writes."""

    async def events() -> AsyncIterator[dict[str, Any]]:
        for number in range(3):
            yield {"group": "pinged", "key": f"pinged_{name}_{number}", "about": name}

    await aemit_many(events())
    if doomed:
        raise Doomed


urlpatterns = [path("", api.urls)]
