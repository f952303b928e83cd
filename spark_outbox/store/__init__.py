"""Every SQL statement that spark_outbox runs, by topic, each next to what maps its rows.

    connection   which outbox a statement means, and how it runs
    reading      the columns of an event, and events by id
    filtering    whose events: a worker's regular expression
    emitting     write events
    claiming     lock events that are ready or due
    scanning     look through the index for events that a worker can handle
    ordering     claim in the order of the ordering keys
    settling     write what came of events and deliveries
    detached     running deliveries, and taking them over
    sessions     which workers are there: their locks and rows
    waking       the locks of the wake protocol, LISTEN, the trigger's mode
    resting      what a worker that found nothing can expect
    isolating    savepoints, and restoring session settings
    limiting     limits on a session or a transaction
    pausing      what is paused, and putting back what has waited for it
    listing      lists of events and deliveries, a page at a time
    sampling     the ends of indexes, for such lists
    stepping     from one name of an index to the next
    repairing    make stray and unhandled events pending again
    flowing      how many events come and go
    triaging     what fails, and since when
    porting      the keys that django-spark has handled
    replaying    make done events pending again, for one handler
    checking     what checks and workers ask before they begin
    definitions  what the migrations define, compared with what the database has

Callers import the topic, and of `connection` the functions. SQL is upper-case constants, with lower-case
keywords and mostly named parameters. Times are the database's. Functions run on the Django connection
`using`, in whatever transaction it is in: it is an alias; some functions also take a connection that has
none. Outcomes are written under a guard, the event's or delivery's status on a row that this transaction
has locked, and say how many rows they applied to.
"""
