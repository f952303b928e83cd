"""Whether the outbox knows the keys that django-spark has handled: else their mails are sent again."""

from spark_outbox import conf
from spark_outbox.errors import NotMigrated
from spark_outbox.store import checking, porting

CHECK = "spark_outbox.E009"
"""The system check. To silence it lets workers start, too."""

REMEDY = "Run: manage.py spark_import_django_spark"


def problem(*, using: str) -> str:
    """Return what is wrong; "" if nothing is, or this role may not see it.

    Keys that KEYS_RETENTION would have forgotten by now are not missed.
    """
    if not porting.may_read(using=using) or not checking.readable(using=using).events:
        return ""
    key = porting.unknown_key(seconds=conf.current().KEYS_RETENTION, using=using)
    if key is None:
        return ""
    return (
        f"Database {using!r} has a table spark_event with keys that the outbox does not know, such as "
        f"{key!r}. django-spark has handled them; if they are emitted, they are handled once more."
    )


def remedy(using: str) -> str:
    return REMEDY + ("" if using == "default" else f" --database {using}")


def check_keys(*, using: str) -> None:
    """Raise NotMigrated if a key of django-spark is not known, unless the check is silenced."""
    if conf.is_silenced(CHECK) or not (text := problem(using=using)):
        return
    raise NotMigrated(
        f"{text} {remedy(using)}. To start without them, give --ignore-django-spark, or put {CHECK!r} "
        "into SILENCED_SYSTEM_CHECKS."
    )
