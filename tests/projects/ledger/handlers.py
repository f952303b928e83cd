from urllib.request import Request, urlopen

from django.conf import settings

from spark_outbox import Event, handler
from spark_outbox.errors import InstanceGone
from tests.projects.ledger.models import Mail


@handler(r"")
def mail(event: Event) -> None:
    """Write a mail in the worker's transaction, about the row as it is now."""
    try:
        subject = f"{event.group}: {event['about']}"
    except InstanceGone:  # deleted meanwhile
        subject = f"{event.group}: gone"
    Mail.objects.create(key=event.key, subject=subject)


@handler(r"", backoff=0.1)
def post(event: Event) -> None:
    """Call a webhook, which knows a repetition by the key."""
    request = Request(settings.WEBHOOKS, event.group.encode(), {"Idempotency-Key": event.key})
    with urlopen(request, timeout=30):
        pass
