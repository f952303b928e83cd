"""A TCP proxy on loopback that fails on command: the network between a client and its server."""

import asyncio
import contextlib
import socket
import struct
import threading
from asyncio import StreamReader, StreamWriter, Task
from collections.abc import Callable
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: closing drops unsent bytes, and sends a RST."""


class Proxy:
    """Listens on 127.0.0.1, and connects each client to `server`, a conninfo.

    Its methods may be called from any thread, and return once they are in force. A failure lasts until
    `heal`, except `reset`, which is over at once, and `stall`, which `resume` ends, too.
    """

    def __init__(self, server: str) -> None:
        self._server = {name: str(value) for name, value in conninfo_to_dict(server).items()}
        self.port = 0
        self.accepted = 0
        """The number of connections so far."""
        self.held = 0
        """The number of chunks of bytes that were held back."""
        self.swallowed = 0
        """The number of chunks of bytes that were lost."""
        self._links: dict[Task[object], list[StreamWriter]] = {}
        self._lost: set[Task[object]] = set()  # links whose bytes are dropped, until they are reset
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._is_black_hole = False
        self._refuses = False
        self._delay = 0.0
        self._closing = asyncio.Event()
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._is_ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    @property
    def url(self) -> str:
        """The conninfo of the same database through the proxy."""
        return make_conninfo(**{**self._server, "host": "127.0.0.1", "port": str(self.port)})

    # Failures

    def reset(self) -> None:
        """Send a RST to both ends of all connections. New ones are served."""
        self._do(lambda: self._reset(list(self._links)))

    def stall(self) -> None:
        """Hold back all bytes, in both directions, until `resume`; lose none."""
        self._do(self._flowing.clear)

    def resume(self) -> None:
        self._do(self._flowing.set)

    def black_hole(self) -> None:
        """Drop all bytes silently, also of new connections, and also each end of a connection."""

        def lose() -> None:
            self._is_black_hole = True
            self._lost.update(self._links)

        self._do(lose)

    def lose(self) -> None:
        """Drop all bytes of the current connections; serve new ones."""
        self._do(lambda: self._lost.update(self._links))

    def slow(self, seconds: float) -> None:
        """Delay each chunk of bytes by `seconds`."""
        self._do(lambda: setattr(self, "_delay", seconds))

    def refuse(self) -> None:
        """Reset new connections at once."""
        self._do(lambda: setattr(self, "_refuses", True))

    def heal(self) -> None:
        """End all failures; reset the connections whose bytes were dropped."""

        def heal() -> None:
            self._is_black_hole = self._refuses = False
            self._delay = 0.0
            self._reset(list(self._lost))
            self._flowing.set()

        self._do(heal)

    # Its loop, in a thread of its own

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1000)
        self.port = server.sockets[0].getsockname()[1]
        self._is_ready.set()
        await self._closing.wait()
        server.close()
        while links := list(self._links):
            self._reset(links)
            await asyncio.wait(links)

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        link = asyncio.current_task()
        assert link is not None
        self.accepted += 1
        self._links[link] = writers = [writer]
        try:
            if self._refuses:
                _abort(writer)
                return
            if self._is_black_hole:
                self._lost.add(link)
                while await reader.read(65536):
                    self.swallowed += 1
                await asyncio.Future()
            other_reader, other_writer = await self._connect()
            writers.append(other_writer)
            ends = {
                asyncio.ensure_future(self._relay(link, reader, other_writer)),
                asyncio.ensure_future(self._relay(link, other_reader, writer)),
            }
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for end in ends:
                    end.cancel()
                await asyncio.gather(*ends, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in writers:
                each.close()
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await each.wait_closed()
            del self._links[link]
            self._lost.discard(link)

    async def _connect(self) -> tuple[StreamReader, StreamWriter]:
        host, port = self._server.get("host", "localhost"), self._server.get("port", "5432")
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, int(port))

    async def _relay(self, link: Task[object], reader: StreamReader, writer: StreamWriter) -> None:
        while data := await reader.read(65536):
            if self._delay:
                await asyncio.sleep(self._delay)
            if not self._flowing.is_set():
                self.held += 1
                await self._flowing.wait()
            if link in self._lost:
                self.swallowed += 1
                continue
            writer.write(data)
            await writer.drain()
        await self._flowing.wait()
        if link in self._lost:
            await asyncio.Future()

    def _reset(self, links: list[Task[object]]) -> None:
        for link in links:
            for writer in self._links[link]:
                _abort(writer)
            link.cancel()

    def _do(self, act: Callable[[], None]) -> None:
        """Run `act` in the loop, and wait until that is done."""

        async def run() -> None:
            act()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)


def _abort(writer: StreamWriter) -> None:
    """Close one end of a connection with a RST."""
    with contextlib.suppress(OSError):  # it is closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
    writer.transport.abort()
