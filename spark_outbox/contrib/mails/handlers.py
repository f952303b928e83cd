"""The handler that sends one mail to one recipient."""

from spark_outbox import handler
from spark_outbox.contrib.mails import GROUP, sending

handler(rf"^{GROUP}\Z", name="spark_outbox.contrib.mails.send", timeout=60)(sending.send)
