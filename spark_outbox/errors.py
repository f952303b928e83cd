"""What can go wrong, as exceptions; database errors pass through unwrapped.

SparkOutboxError
├── SettingsError         SPARK_OUTBOX holds something it must not
├── NotMigrated           the database has no outbox
├── RegistrationError     a handler or source can't be registered
├── EmitError             nothing was written
│   ├── InvalidEvent      the group, the key or an option is not acceptable
│   ├── UnstorableValue   a payload value can't be stored; names its path and the cure
│   └── NotInTransaction  REQUIRE_ATOMIC is set and there is no transaction
└── HandlingError         raised inside a handler: its delivery fails, and is tried again
    ├── UnreadablePayload the stored payload is not one that emit() writes
    ├── InstanceGone      the row that the payload refers to was deleted since
    └── BrokenTransaction the handler swallowed a database error and left a dead transaction
"""

from django.core.exceptions import ImproperlyConfigured


class SparkOutboxError(Exception):
    """Base of every exception that spark_outbox raises itself."""


class SettingsError(SparkOutboxError, ImproperlyConfigured):
    pass


class RegistrationError(SparkOutboxError, ValueError):
    pass


class NotMigrated(SparkOutboxError):
    pass


class EmitError(SparkOutboxError):
    pass


class InvalidEvent(EmitError, ValueError):
    pass


class UnstorableValue(EmitError, TypeError):
    pass


class NotInTransaction(EmitError, RuntimeError):
    pass


class HandlingError(SparkOutboxError):
    pass


class UnreadablePayload(HandlingError, ValueError):
    pass


class InstanceGone(HandlingError, LookupError):
    pass


class BrokenTransaction(HandlingError, RuntimeError):
    pass
