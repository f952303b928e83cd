drop function spark_explain(text);
drop function spark_outbox_explain_pending(bigint);
drop view spark_outbox_health;
drop view spark_outbox_snapshots;
drop view spark_outbox_workers;
