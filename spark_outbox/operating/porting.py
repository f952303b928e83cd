"""Take over the keys that django-spark has handled; worker/ported.py finds those that are missing."""

from collections.abc import Iterator

from django.db import transaction

from spark_outbox.store import porting
from spark_outbox.store.porting import Taken

CHUNK_SIZE = 2000


def has_table(*, using: str) -> bool:
    """Return whether the database has django-spark's table, and this role may read it."""
    return porting.has_table(using=using)


def take_over(*, discards: bool = False, dry_run: bool = False, using: str) -> Iterator[Taken]:
    """Write the keys of django-spark as done; yield the totals after each chunk.

    Each chunk is a transaction. Keys that are known are passed over, so to go on after a stop means to
    do it again. With `discards` events of these keys are given up that wait for handlers here.
    """
    total, after = Taken(), None
    while True:
        with transaction.atomic(using=using):
            taken, last = porting.take_over(after, most=CHUNK_SIZE, using=using)
            if discards and taken.waiting and last is not None:
                discarded = porting.discard(after, last, using=using)
                taken = taken._replace(discarded=discarded)
            transaction.set_rollback(dry_run, using=using)
        total = Taken(*map(sum, zip(total, taken, strict=True)))
        yield total
        if taken.read < CHUNK_SIZE:
            return
        after = last
