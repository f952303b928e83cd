"""Take over the keys that django-spark has handled; worker/ported.py finds those that are missing."""

from collections.abc import Iterator

from django.db import OperationalError, transaction
from psycopg.errors import DeadlockDetected, LockNotAvailable

from spark_outbox.errors import NotMigrated
from spark_outbox.store import porting
from spark_outbox.store.porting import Taken

CHUNK_SIZE = 2000


def has_table(*, using: str) -> bool:
    """Return whether the database has django-spark's table. Raises NotMigrated if this role may not
    read it."""
    may_read = porting.may_read(using=using)
    if may_read is False:
        raise NotMigrated(
            f"This role may not read the table spark_event in database {using!r}, and its keys must be "
            "taken over. Connect as the role that owns the tables."
        )
    return may_read is not None


def take_over(*, discards: bool = False, dry_run: bool = False, using: str) -> Iterator[Taken]:
    """Write the keys of django-spark as done; yield the totals after each chunk.

    Each chunk is a transaction. Keys that are known are passed over, so to go on after a stop means to
    do it again. With `discards` events of these keys are given up that wait for handlers here.
    """
    total, after = Taken(), None
    is_alone = not transaction.get_connection(using).in_atomic_block
    while True:
        try:
            with transaction.atomic(using=using):
                if is_alone:
                    porting.wait_briefly(using=using)
                taken, last = _take_over(after, discards=discards, using=using)
                transaction.set_rollback(dry_run, using=using)
        except OperationalError as error:
            if isinstance(error.__cause__, LockNotAvailable | DeadlockDetected):
                continue  # an emitter holds a key: let it have those that this chunk held
            raise
        total = Taken(*map(sum, zip(total, taken, strict=True)))
        yield total
        if taken.read < CHUNK_SIZE:
            return
        after = last


def _take_over(after: str | None, *, discards: bool, using: str) -> tuple[Taken, str | None]:
    """Write the next keys as done; return what became of them, and the last of them."""
    taken, overtaken, last = porting.take_over(after, most=CHUNK_SIZE, using=using)
    if overtaken:
        again, *_ = porting.take_over(after, most=CHUNK_SIZE, using=using)
        taken = taken._replace(waiting=again.waiting)
    if discards and taken.waiting and last is not None:
        taken = taken._replace(discarded=porting.discard(after, last, using=using))
    return taken, last
