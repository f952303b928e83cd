drop trigger if exists spark_outbox_wake on spark_outbox_event; -- "never" has dropped them
drop trigger if exists spark_outbox_wake_again on spark_outbox_event;
drop function spark_outbox_wake();
