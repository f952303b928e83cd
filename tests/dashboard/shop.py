"""An outbox as a shop may have one, for the browser and for the screenshots. Nothing is random."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import connection

from tests.tools import connect

# Over a day, more of them by noon; the last 20 are ready, and each waits for less than a second.
EVENTS = """
insert into spark_outbox_event (key, event_group, status, created_at, finished_at)
select
    'order_' || n, (array['order_placed', 'order_paid', 'invoice', 'stock_changed'])[1 + n % 4],
    case when n > 5980 then 'pending' else 'done' end, at,
    case when n <= 5980 then at + interval '20 milliseconds' end
from (
    select n, statement_timestamp() - interval '1 day' * power((6000 - n) / 6000.0, 1.4)
        * (1 + 0.02 * sin(n / 37.0)) as at
    from generate_series(1, 6000) as n
) as made
order by at
"""

FAILING = """
with event as (
    insert into spark_outbox_event
        (key, event_group, status, attempts, available_at, created_at, finished_at)
    select
        'failing_' || event_group || '_' || kind || '_' || n, event_group, status, attempts,
        case when status = 'pending' then now() + interval '1 hour' end, now() - first,
        case when status = 'failed' then now() - last end
    from failing cross join lateral generate_series(1, number) as n
    returning id, event_group, key
)
insert into spark_outbox_delivery (
    event_id, handler, status, attempts, available_at, attempted_at, duration, worker, error, traceback
)
select
    event.id, failing.handler, failing.status, failing.attempts,
    case when failing.status = 'pending' then now() + interval '1 hour' end,
    now() - failing.first + (failing.first - failing.last) * (
        split_part(event.key, '_', -1)::float / failing.number
    ), failing.number * interval '7 milliseconds', 'shop-1:41', failing.error,
    'Traceback (most recent call last):' || chr(10) || '  File "shop/handlers.py", line 12, in handle'
        || chr(10) || failing.error
from event join failing
    on failing.event_group = event.event_group and event.key like 'failing_%_' || failing.kind || '_%'
"""

KINDS = """
create temporary table failing as
select * from (values
    ('a', 'invoice', 'shop.mail_invoice', 'failed', 20, 41, '40 minutes'::interval,
        '3 minutes'::interval, 'smtplib.SMTPRecipientsRefused: no such mailbox: "anna@example.com"'),
    ('b', 'stock_changed', 'shop.search.index', 'pending', 4, 12, '50 hours', '2 hours',
        'requests.ConnectTimeout: search.example.com:9200 does not answer'),
    ('c', 'order_paid', 'shop.accounts.book', 'failed', 5, 7, '6 days', '30 hours',
        'decimal.InvalidOperation: order 4711 has no amount'),
    ('d', 'order_placed', 'shop.webhook', 'pending', 1, 3, '20 minutes', '1 minute',
        'http.client.HTTPException: 502 Bad Gateway')
) as kinds (kind, event_group, handler, status, attempts, number, first, last, error)
"""

WORKER = """
insert into spark_outbox_session (session, name, version, backend, handlers, started_at)
values (%s, %s, '0.1.0', pg_backend_pid(), '["shop.mail_invoice"]', now() - interval '1 hour')
"""


@contextmanager
def filled() -> Iterator[None]:
    """Fill the outbox, and have two workers be there, until the end of the block."""
    with connection.cursor() as cursor:
        cursor.execute(EVENTS)
        cursor.execute(KINDS)
        cursor.execute(FAILING)
        cursor.execute("drop table failing")
    with connect() as one, connect() as two:
        for number, worker in enumerate((one, two), start=1):
            worker.execute("select pg_advisory_lock(7531003, %s)", [number])
            worker.execute(WORKER, [number, f"shop-{number}:41"])
        one.execute("select pg_advisory_lock(7531002, 1)")  # it has the watch
        yield
