"""The outbox in the Django admin: its events and deliveries, which can be looked at and not edited.

    events      the list of events, an event's page, and the addresses of what can be done to events
    deliveries  the list of deliveries, and a delivery's page
    asking      retry, discard, replay and rehearse: who may, and to which events
    acting      the page that asks, and doing it
    documents   payloads and headers as HTML
    changelist  lists that read a bounded number of rows, and their filters
    searching   what a search field's text asks for
    base        what both kinds of pages have

All that is shown comes from `operating`, and all that is done goes through it.
"""

import spark_outbox.dashboard.admin  # noqa: F401, which registers itself
from spark_outbox.admin import deliveries, events

__all__ = ["deliveries", "events"]
