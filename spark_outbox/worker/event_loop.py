"""The event loop on which a worker's async handlers run, side by side.

The loop only turns while the worker is in one of the methods of `EventLoop`: it waits for the calls of a
batch, lets those left over from earlier ones make a step between two batches, or would sleep. The time
for which the loop stands still is not counted towards a call's timeout.
"""

import asyncio
import contextlib
import math
import select
import time
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.db import connections

from spark_outbox.errors import HandlerTimeout
from spark_outbox.processes.guard import CallGuard
from spark_outbox.registry.handlers import Handler
from spark_outbox.worker.batch import Call
from spark_outbox.worker.context import Context
from spark_outbox.worker.observed import observe

T = TypeVar("T")

PATIENCE = 1.25
"""A call that blocks the loop is interrupted after so many times its timeout."""

STEPS = 10
"""How often the loop turns between two batches."""


class EventLoop:
    """The calls of async handlers that are under way: up to ASYNC_CONCURRENCY.

    Django's async ORM runs its queries in a thread of its own, so on connections of its own: what
    these handlers write is committed apart from the worker's transaction.
    """

    def __init__(self, context: Context) -> None:
        self.must_end = context.direct is None
        """A batch waits for all of its calls: they can't go on after its commit."""
        self._concurrency = context.settings.ASYNC_CONCURRENCY
        self._guard = context.guard
        self._using = context.using
        self._running: dict[asyncio.Task[None], Call] = {}
        self._timeouts: dict[asyncio.Task[None], asyncio.Timeout] = {}
        self._stands_since: float | None = None  # by the loop's clock
        self._runner: asyncio.Runner | None = None

    def __len__(self) -> int:
        return len(self._running)

    @property
    def room(self) -> int:
        return self._concurrency - len(self._running)

    def lacks_room(self, handlers: Iterable[Handler], *, begun: int = 0) -> bool:
        """Return whether some of these handlers can only be called when another call has ended. `begun`
        calls are about to start."""
        return self.room <= begun and any(handler.is_async for handler in handlers)

    def start(self, calls: Iterable[Call]) -> None:
        loop = self._loop()
        self._turn(sync_to_async(_tidy)())
        for call in calls:
            observe(call, self._using)
            timeout = asyncio.Timeout(None)
            task = loop.create_task(_run(call, timeout))
            task.add_done_callback(self._running.pop)
            task.add_done_callback(self._timeouts.pop)
            self._running[task] = call
            self._timeouts[task] = timeout

    def wait_for(self, calls: Iterable[Call], *, first: float | None, others: float | None) -> None:
        """Run the loop until `calls` have ended; but for no longer than `first` seconds until one of
        them has, and then `others` seconds for the rest. None means for as long as it takes."""
        wanted = set(calls)
        tasks = {task for task, call in self._running.items() if call in wanted}
        if tasks:
            self._turn(_wait(tasks, first, others))

    def finish(self) -> None:
        """Run the loop until all calls have ended."""
        self.wait_for(list(self._running.values()), first=None, others=None)

    def abandon(self, calls: Iterable[Call]) -> None:
        """Cancel calls whose outcome nobody can settle any more."""
        unwanted = set(calls)
        tasks = [task for task, call in self._running.items() if call in unwanted]
        for task in tasks:
            task.cancel()
        if tasks:
            self._turn(_wait(set(tasks), 1.0, 1.0))

    def turn(self) -> None:
        """Let what is under way make a few steps, without waiting for anything."""
        if self._running:
            self._turn(_take_steps())

    def poll(self, descriptors: list[int], seconds: float) -> set[int]:
        """Wait until a file descriptor can be read, or a call has ended; return which can.

        The database need not answer meanwhile.
        """
        self._guard.rest(seconds)
        if self._running:
            readable = self._turn(_poll(descriptors, set(self._running), seconds))
        else:
            readable = poll(descriptors, seconds)
        self._guard.put_down()
        return readable

    def close(self) -> None:
        """Cancel what is under way; close the connections of Django's async ORM."""
        if self._runner is not None:
            self.abandon(list(self._running.values()))
            self._turn(sync_to_async(connections.close_all)())
            self._runner.close()
            self._runner = None

    def _loop(self) -> asyncio.AbstractEventLoop:
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.get_loop()

    def _turn(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the loop until `coroutine` returns.

        asyncio's timeouts can't end a handler that blocks the loop. So an alarm is set that each
        turn of the loop puts off, and that rings when none has for longer than any may take.
        """
        loop = self._loop()
        task = loop.create_task(self._go_on(coroutine))
        running = self._running.values()
        self._guard.take_in_hand(*_called(running))
        try:
            return self._run_until_complete(loop, task)
        finally:
            self._stands_since = loop.time()
            self._guard.keep(*_called(running))
            self._guard.put_down()

    async def _go_on(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Put timeouts off by as long as the loop stood still. Runs before any of them can strike."""
        now = asyncio.get_running_loop().time()
        if self._stands_since is not None:
            for task, timeout in self._timeouts.items():
                when = timeout.when()
                if when is not None and not (timeout.expired() or task.done()):
                    timeout.reschedule(when + now - self._stands_since)
        return await coroutine

    def _run_until_complete(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[T]) -> T:
        limits = [call.handler.policy.limit() for call in self._running.values()]
        longest = max((limit for limit in limits if limit is not None), default=None)
        if longest is None or not self._guard.interrupts:
            return loop.run_until_complete(task)
        patience = longest * PATIENCE
        self._guard.start(patience)
        watchdog = loop.create_task(_put_off(self._guard, patience))
        try:
            while not task.done():
                with contextlib.suppress(HandlerTimeout):  # it has also ended the call that blocked
                    loop.run_until_complete(task)
        finally:
            try:
                self._guard.stop()
            except HandlerTimeout:  # it has rung as it was about to be stopped: nothing is late
                self._guard.stop()
            watchdog.cancel()
        return task.result()


def _called(calls: Iterable[Call]) -> list[tuple[int, int]]:
    return [(call.event.id, call.handler.number) for call in calls]


def poll(descriptors: list[int], seconds: float) -> set[int]:
    """Wait until some of the file descriptors can be read; return which."""
    waiting = select.poll()
    for descriptor in descriptors:
        waiting.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in waiting.poll(math.ceil(seconds * 1000))}


async def _run(call: Call, timeout: asyncio.Timeout) -> None:
    call.started = started = time.monotonic()
    limit = call.handler.policy.limit()
    try:
        async with timeout:
            if limit is not None:
                timeout.reschedule(asyncio.get_running_loop().time() + limit)
            with call.observed.under_way() if call.observed is not None else contextlib.nullcontext():
                await call.handler.start(call.event)  # type: ignore[misc]
    except BaseException as error:  # noqa: BLE001, whatever a handler raises is its delivery's fate
        call.error = error
        if timeout.expired():
            call.error = HandlerTimeout()
            call.error.__cause__ = error
    call.seconds = time.monotonic() - started
    call.has_ended = True


async def _take_steps() -> None:
    for _ in range(STEPS):
        await asyncio.sleep(0)


async def _wait(tasks: set[asyncio.Task[None]], first: float | None, others: float | None) -> None:
    done, rest = await asyncio.wait(tasks, timeout=first, return_when=asyncio.FIRST_COMPLETED)
    if done and rest:
        await asyncio.wait(rest, timeout=others)


async def _poll(descriptors: list[int], tasks: set[asyncio.Task[None]], seconds: float) -> set[int]:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    ready: set[int] = set()

    def note(descriptor: int) -> None:
        ready.add(descriptor)
        if not readable.done():
            readable.set_result(None)

    for descriptor in descriptors:
        loop.add_reader(descriptor, note, descriptor)
    try:
        await asyncio.wait({readable, *tasks}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)
    return ready


async def _put_off(guard: CallGuard, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds / 4)
        guard.start(seconds)


def _tidy() -> None:
    """Do to the async ORM's connections what Django does between requests."""
    for connection in connections.all(initialized_only=True):
        connection.queries_log.clear()
        connection.close_if_unusable_or_obsolete()
