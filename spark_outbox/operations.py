"""Operations for the migrations of projects."""

import logging
from typing import Any

from django.db import ProgrammingError, connections, router, transaction
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.operations.base import Operation

from spark_outbox.operating import porting
from spark_outbox.worker.session import check_outbox

logger = logging.getLogger(__name__)


class ImportDjangoSpark(Operation):
    """Take over the keys that django-spark has handled, as `manage.py spark_import_django_spark` does.

    Its migration depends on ("spark_outbox", "0001_initial"). With `atomic = False` each chunk is
    committed by itself. A database without the table of django-spark is left as it is, and one that the
    router keeps the outbox out of.
    """

    reduces_to_sql = False
    reversible = True

    def state_forwards(self, *_: Any) -> None:
        """Change no model."""

    def database_forwards(
        self, _app_label: str, schema_editor: BaseDatabaseSchemaEditor, *_states: Any
    ) -> None:
        from spark_outbox.models import OutboxEvent

        using = schema_editor.connection.alias
        if not router.allow_migrate_model(using, OutboxEvent):
            return
        if schema_editor.connection.vendor != "postgresql" or not porting.has_table(using=using):
            return
        check_outbox(None, using=using)
        total = list(porting.take_over(using=using))[-1]
        counts = {"database": using, **total._asdict()}
        logger.info(
            "Of %(read)s keys of django-spark, %(new)s are new and done. %(mended)s had an empty or too "
            "long group, %(unfit)s are left out, %(waiting)s wait for handlers here.",
            counts,
            extra=counts,
        )

    def database_backwards(self, *_: Any) -> None:
        """Keep the keys: they have been handled."""

    def describe(self) -> str:
        return "Take over the keys that django-spark has handled"


def is_planned(*, using: str) -> bool:
    """Return whether `migrate` would run this operation on this database. A role that may not read which
    migrations have run is told that it would not."""
    try:
        with transaction.atomic(using=using):
            loader = MigrationLoader(connections[using])
    except ProgrammingError:
        return False
    return any(
        isinstance(operation, ImportDjangoSpark)
        for key, migration in loader.disk_migrations.items()
        if key not in loader.applied_migrations
        for operation in migration.operations
    )
