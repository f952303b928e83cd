drop function spark_outbox_forget_keys;
drop trigger spark_outbox_pruned on spark_outbox_event;
drop function spark_outbox_refuse_pruned();
drop function spark_outbox_prune;
drop function spark_outbox_referenced(bigint[]);
