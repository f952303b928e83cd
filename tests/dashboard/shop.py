"""An outbox as a shop may have one, for the browser and for the screenshots. Nothing is random."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import connection

from spark_outbox.registry.handlers import Registry
from tests.tools import connect

HANDLERS = {
    "shop.mail_invoice": "^invoice$",
    "shop.accounts.book": "^(order_paid|invoice)$",
    "shop.search.index": "^stock_changed$",
    "shop.webhook": "^order_",
}

# A day, with more in the evening than by night. Those of the minute to come are ready: so none is late.
EVENTS = """
insert into spark_outbox_event (key, event_group, status, created_at, finished_at)
select
    'order_' || row_number() over (order by minute desc, n),
    (array['order_placed', 'order_paid', 'invoice', 'stock_changed'])[1 + (minute + n) % 4],
    case when minute = 0 then 'pending' else 'done' end,
    at,
    case when minute > 0 then at + (12 + 40 * abs(sin(minute * n)) ^ 6) * interval '1 millisecond' end
from (
    select minute, n, statement_timestamp() - (minute - 1 + n * 0.05) * interval '1 minute' as at
    from generate_series(0, 1438) as minute cross join lateral generate_series(
        1, (6 + 3.5 * sin(minute / 229.0 + 1) + 1.6 * sin(minute / 4.0) + sin(minute / 2.7))::integer
    ) as n
) as made
order by at
"""

# Emitted before, as ids and times have one order.
REMINDERS = """
insert into spark_outbox_event (key, event_group, status, available_at, created_at)
select
    'reminder_' || n, 'reminder', 'pending', now() + n * interval '20 minutes', now() - interval '8 days'
from generate_series(1, 12) as n
"""

FAILING = """
with event as (
    insert into spark_outbox_event
        (key, event_group, status, attempts, available_at, created_at, finished_at)
    select
        'failing_' || event_group || '_' || kind || '_' || n, event_group, status, attempts,
        case when status = 'pending' then now() + interval '1 hour' end, now() - interval '8 days',
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
    on failing.event_group = event.event_group and split_part(event.key, '_', -2) = failing.kind
"""

KINDS = """
create temporary table failing as
select * from (values
    ('a', 'invoice', 'shop.mail_invoice', 'failed', 1, 141, '40 minutes'::interval,
        '3 minutes'::interval, 'smtplib.SMTPRecipientsRefused: no such mailbox: "anna@example.com"'),
    ('b', 'stock_changed', 'shop.search.index', 'pending', 4, 26, '50 hours', '2 hours',
        'requests.ConnectTimeout: search.example.com:9200 does not answer'),
    ('c', 'order_paid', 'shop.accounts.book', 'failed', 5, 7, '6 days', '30 hours',
        'decimal.InvalidOperation: order 4711 has no amount'),
    ('d', 'order_placed', 'shop.webhook', 'pending', 1, 3, '20 minutes', '1 minute',
        'http.client.HTTPException: 502 Bad Gateway'),
    ('e', 'order_placed', 'shop.webhook', 'failed', 8, 31, '65 hours', '5 hours',
        'json.JSONDecodeError: Expecting value: line 1 column 1 (char 0)')
) as kinds (kind, event_group, handler, status, attempts, number, first, last, error)
"""

WORKER = """
insert into spark_outbox_session (session, name, version, backend, handlers, started_at)
values (%s, %s, '0.1.0', pg_backend_pid(), '["shop.mail_invoice"]', now() - interval '1 hour')
"""


@contextmanager
def filled(registry: Registry) -> Iterator[None]:
    """Fill the outbox, and have two workers be there, until the end of the block."""
    for name, group in HANDLERS.items():
        registry.add_handler(lambda event: None, group=group, name=name)
    with connection.cursor() as cursor:
        cursor.execute(REMINDERS)
        cursor.execute(KINDS)
        cursor.execute(FAILING)
        cursor.execute(EVENTS)
        cursor.execute("drop table failing")
    with connect() as one, connect() as two:
        for number, worker in enumerate((one, two), start=1):
            worker.execute("select pg_advisory_lock(7531003, %s)", [number])
            worker.execute(WORKER, [number, f"shop-{number}:41"])
        one.execute("select pg_advisory_lock(7531002, 1)")  # it has the watch
        yield
