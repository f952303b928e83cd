"""Clients of the service. Some hang up early, and all bear that the server is killed."""

import asyncio
import random
from collections import Counter

import httpx

VIEWS = ("note", "bridge", "ping", "pings")
CLIENTS = 20


class Load:
    def __init__(self, port: int, requests: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self.requests = requests
        self._numbers = iter(range(requests))
        self.counts: Counter[str] = Counter()
        self.sent: dict[str, str] = {}
        """What came of each request, by its view and name."""

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            await asyncio.gather(*(self._send(client) for _ in range(CLIENTS)))
        self.counts.update(self.sent.values())

    def notes(self, end: str) -> set[str]:
        """Return the keys of events with rows, of requests that came to this end."""
        return {f"noted_{number}" for view, number in self._ended(end) if view in ("note", "bridge")}

    def pings(self, end: str) -> set[str]:
        """Return the keys of events without rows."""
        one = {f"pinged_{number}" for view, number in self._ended(end) if view == "ping"}
        many = {number for view, number in self._ended(end) if view == "pings"}
        return one | {f"pinged_{number}_{each}" for number in many for each in range(3)}

    def _ended(self, end: str) -> list[list[str]]:
        return [request.split("/") for request, found in self.sent.items() if found == end]

    async def _send(self, client: httpx.AsyncClient) -> None:
        for number in self._numbers:
            view, doomed, hurried = VIEWS[number % 4], number % 7 == 0, number % 5 == 0
            path = f"{view}/{number}"
            while True:
                try:
                    async with asyncio.timeout(random.uniform(0, 0.1) if hurried else None):
                        response = await client.post(path, params={"doomed": doomed})
                except httpx.ConnectError:  # it is being restarted
                    await asyncio.sleep(0.05)
                    continue
                except TimeoutError:
                    self.sent[path] = "hung up"
                except httpx.TransportError:
                    self.sent[path] = "cut off"
                else:
                    assert response.status_code == (500 if doomed else 200), response.text
                    self.sent[path] = "doomed" if doomed else "acknowledged"
                break
