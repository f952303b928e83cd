"""The dashboard, in the Django admin: pages that show the outbox at a glance.

    admin        the pages' addresses, and who may see them
    figures      what the dashboard shows, in words
    charts       how many events come and go, as SVG
    triage       what fails, and retrying or discarding it
    links        addresses of pages, also of those that are not there
    wording      numbers, ages and times, as people read them

Whoever may view the dashboard sees numbers, groups, handlers, keys, errors and tracebacks, and never a
payload. All that is shown comes from `operating`.
"""
