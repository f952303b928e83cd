"""python -m tests.chaos.writer NAME SEED: commit orders with events, until SIGTERM.

After any error it goes on with a new connection. NAME-PID.acknowledged gets the keys of transactions
whose commit the server confirmed, NAME-PID.rolled_back those that were rolled back on purpose. SIGUSR1:
begin new ordering keys.
"""

import os
import random
import signal
import sys
import time
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import django

django.setup()

from django.db import Error, connection, transaction  # noqa: E402

from spark_outbox import emit, emit_many  # noqa: E402
from spark_outbox.errors import IdCollision, SparkOutboxError  # noqa: E402
from tests.chaos.models import Order  # noqa: E402

GROUPS = {
    "chaos_plain": 30,
    "chaos_quiet": 10,
    "chaos_ordered": 20,
    "chaos_delayed": 8,
    "chaos_sourced": 6,
    "chaos_flaky": 6,
    "chaos_batch": 10,
    "chaos_async": 5,
    "chaos_detached": 1,
    "chaos_new": 5,
    "chaos_transfer_up": 2,
    "chaos_transfer_down": 2,
    "chaos_doomed": 1,
    "chaos_untidy": 1,
    "chaos_rude": 0.5,
}
VICES = (
    *("segfault", "exit", "spin", "leak", "leak", "leak"),
    *("hang up", "interrupt", "terminate", "roll back"),
)
BACKLOG = 1500


class RolledBack(Exception):
    pass


class Planned(NamedTuple):
    key: str
    group: str
    options: dict[str, Any]
    payload: dict[str, Any]


class Writer:
    def __init__(self, name: str, seed: str, folder: Path) -> None:
        self.random = random.Random(seed)
        self.name = f"{name}-{os.getpid()}"
        self.numbers, self.positions = count(), count()
        self.life = 0  # one per connection: a lost one may still commit, after the next one's commits
        self.earlier: list[Planned] = []
        self.acknowledged = (folder / f"{self.name}.acknowledged").open("a", buffering=1)
        self.rolled_back = (folder / f"{self.name}.rolled_back").open("a", buffering=1)
        self.collided = (folder / f"{self.name}.collided").open("a", buffering=1)
        self.stopping = self.renewing = False

    def run(self) -> None:
        while not self.stopping:
            try:
                if self.renewing:
                    self.renew()
                self.commit_some()
                if "pool" in connection.settings_dict["OPTIONS"]:
                    connection.close()  # as after a request: back to the pool
                self.wait()
            except (Error, SparkOutboxError) as error:
                if isinstance(error, IdCollision):
                    self.collided.write("once\n")
                connection.close()
                self.renew()
                time.sleep(0.1)

    def renew(self) -> None:
        """Begin new ordering keys: from here ids may not ascend."""
        self.renewing = False
        self.life += 1
        self.earlier = [each for each in self.earlier if "ordering_key" not in each.options]

    def commit_some(self) -> None:
        """Run one transaction of several events."""
        plans = [self.plan() for _ in range(self.random.choice((1, 1, 1, 2, 5, 20)))]
        doomed = self.random.random() < 0.1
        at_once = self.random.random() < 0.3
        kept: list[Planned] = []
        try:
            with transaction.atomic():
                if at_once:
                    kept += self.emit_all(plans)
                else:
                    for planned in plans:
                        kept += self.emit(planned)
                time.sleep(self.random.choice((0, 0, 0, 0.002, 0.02)))
                # If the rollback to a savepoint has failed, Django rolls all back without an error.
                if doomed or transaction.get_rollback():
                    raise RolledBack
        except RolledBack:
            self.note(self.rolled_back, kept)
        else:
            self.note(self.acknowledged, kept)
        finally:
            self.earlier = (self.earlier + plans)[-50:]  # also those with an unknown outcome

    def emit(self, planned: Planned) -> list[Planned]:
        """Emit one event, sometimes in a savepoint that may be rolled back; return it if it was kept."""
        chance = self.random.random()
        if chance > 0.2:
            self.write(planned)
            return [planned]
        try:
            with transaction.atomic():
                self.write(planned)
                if chance < 0.07:
                    raise RolledBack
        except RolledBack:
            return []
        return [planned]

    def emit_all(self, plans: list[Planned]) -> list[Planned]:
        """Emit several events in one call, in their order."""
        plans = [planned for planned in plans if planned.group != "chaos_sourced"]
        Order.objects.bulk_create(map(self.order, plans), ignore_conflicts=True)
        emit_many({"group": p.group, "key": p.key, **p.options, **p.payload} for p in plans)
        return plans

    def write(self, planned: Planned) -> None:
        """Write the order and its event, unless they exist already."""
        if planned.group == "chaos_sourced":
            if not Order.objects.filter(key=planned.key).exists():
                self.save_pair(planned)
            return
        Order.objects.bulk_create([self.order(planned)], ignore_conflicts=True)
        if planned.options or self.random.random() < 0.7:
            emit(planned.group, planned.key, **planned.options, **planned.payload)
        else:
            emit_many([{"group": planned.group, "key": planned.key, **planned.payload}])

    def save_pair(self, planned: Planned) -> None:
        """Save an order whose source emits two events, the first of them with the higher key."""
        twin = self.order(planned._replace(key=f"{planned.key}-twin"))
        Order.objects.bulk_create([twin])  # which sends no signal
        order = self.order(planned)
        order.twin = twin.key
        order.save()  # its source emits both

    def order(self, planned: Planned) -> Order:
        return Order(
            key=planned.key,
            group=planned.group,
            delay=planned.options.get("delay"),
            ordering_key=planned.options.get("ordering_key"),
            position=next(self.positions),
        )

    def plan(self) -> Planned:
        if self.earlier and self.random.random() < 0.1:
            return self.random.choice(self.earlier)
        (group,) = self.random.choices(list(GROUPS), list(GROUPS.values()))
        options: dict[str, Any] = {}
        payload: dict[str, Any] = {"order": 1, "price": "12.50"}
        match group:
            case "chaos_sourced":
                options["ordering_key"] = f"{self.name}-{self.life}-{self.random.randrange(4)}"
            case "chaos_ordered":
                options["ordering_key"] = f"{self.name}-{self.life}-{self.random.randrange(4)}"
                payload["fails"] = self.random.choice((0,) * 30 + (1, 2))
            case "chaos_delayed":
                options["delay"] = timedelta(seconds=self.random.uniform(0, 3))
            case "chaos_flaky":
                payload["fails"] = self.random.randrange(4)
            case "chaos_quiet" if self.random.random() < 0.1:
                payload["image"] = self.random.randbytes(10_000).hex()  # takes new pages of the disk
            case "chaos_rude":
                payload["vice"] = self.random.choice(VICES)
        return Planned(f"{self.name}-{next(self.numbers)}", group, options, payload)

    def wait(self) -> None:
        """Pause, and wait while the backlog is long."""
        time.sleep(self.random.uniform(0, 0.03))
        if self.random.random() < 0.05:
            while self.backlog() > BACKLOG and not self.stopping:
                time.sleep(0.1)

    def backlog(self) -> int:
        with connection.cursor() as cursor:
            cursor.execute(
                "select count(*) from (select from spark_outbox_event"
                " where status = 'pending' and available_at is null limit %s) as ready",
                [BACKLOG + 1],
            )
            return int(cursor.fetchone()[0])

    @staticmethod
    def note(file: Any, plans: list[Planned]) -> None:
        file.write("".join(f"{planned.key}\n" for planned in plans))


def main() -> None:
    name, seed = sys.argv[1:]
    writer = Writer(name, seed, Path(os.environ["CHAOS_FILES"]))
    signal.signal(signal.SIGTERM, lambda *_: setattr(writer, "stopping", True))
    signal.signal(signal.SIGUSR1, lambda *_: setattr(writer, "renewing", True))
    writer.run()


if __name__ == "__main__":
    main()
