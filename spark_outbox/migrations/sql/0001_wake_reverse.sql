drop trigger if exists spark_outbox_wake on spark_outbox_event; -- "never" has dropped it
drop function spark_outbox_wake();
