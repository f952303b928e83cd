drop view spark_outbox_failures;
drop view spark_outbox_pauses;
drop view spark_outbox_status;
drop index spark_outbox_delivery_failing;
drop function spark_outbox_fingerprint(text);
drop view spark_outbox_events;
