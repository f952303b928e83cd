"""spark_outbox_status, whatever times are in the table; frozen SQL, since a database may have run it.

Up to PostgreSQL 16 an age since `-infinity`, which SQL may have put there, is an error.
"""

from django.db import migrations

from spark_outbox.migrations._postgresql import RunSQL

STATUS = """
create or replace view spark_outbox_status as
select
    event_group,
    count(*) filter (
        where status = 'pending' and (available_at is null or available_at <= statement_timestamp())
    ) as pending,
    count(*) filter (
        where status = 'pending' and available_at > statement_timestamp()
    ) as delayed,
    count(*) filter (where status = 'running') as running,
    count(*) filter (where status = 'done') as done,
    count(*) filter (where status = 'failed') as failed,
    count(*) filter (where status = 'unhandled') as unhandled,
    count(*) filter (where status = 'discarded') as discarded,
    statement_timestamp() - min(coalesce(available_at, created_at)) filter (
        where status = 'pending' and (available_at is null or available_at <= statement_timestamp())
            {finite}
    ) as oldest_pending_age
from spark_outbox_event
group by event_group;
"""


class Migration(migrations.Migration):
    dependencies = [("spark_outbox", "0005_least_privilege")]

    operations = [
        RunSQL(
            STATUS.format(finite="and isfinite(coalesce(available_at, created_at))"),
            STATUS.format(finite=""),
        ),
    ]
