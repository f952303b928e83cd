"""Many clients of the service: `python -m tests.projects.service.drive PORT REQUESTS`.

Some hang up early, and all bear that the server is killed. The last line of the output says what came of
each request, by its view and number.
"""

import asyncio
import json
import random
import sys
from collections.abc import Iterator

import httpx

VIEWS = ("note", "bridge", "ping", "pings")
CLIENTS = 20


async def send_all(port: int, requests: int) -> dict[str, str]:
    numbers = iter(range(requests))
    ends: dict[str, str] = {}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        await asyncio.gather(*(send(client, numbers, ends) for _ in range(CLIENTS)))
    return ends


async def send(client: httpx.AsyncClient, numbers: Iterator[int], ends: dict[str, str]) -> None:
    """Send one request after the other. A number is sent again only if nothing has answered at all."""
    for number in numbers:
        path = f"{VIEWS[number % 4]}/{number}"
        doomed, hurried = number % 7 == 0, number % 5 == 0
        while path not in ends:
            try:
                async with asyncio.timeout(random.uniform(0, 0.1) if hurried else None):
                    response = await client.post(path, params={"doomed": doomed})
            except httpx.ConnectError:  # it is being restarted
                await asyncio.sleep(0.05)
            except TimeoutError:
                ends[path] = "hung up"
            except httpx.TransportError:
                ends[path] = "cut off"
            else:
                assert response.status_code == (500 if doomed else 200), response.text
                ends[path] = "doomed" if doomed else "acknowledged"


if __name__ == "__main__":
    print(json.dumps(asyncio.run(send_all(*map(int, sys.argv[1:])))))
