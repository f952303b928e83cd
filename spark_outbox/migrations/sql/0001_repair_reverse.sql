drop function spark_replay(text, text);
drop function spark_discard(text, text);
drop function spark_outbox_give_up(bigint[], text);
drop function spark_retry_failed;
drop function spark_outbox_lock_failed;
drop function spark_retry(text);
drop function spark_outbox_reopen(bigint[], text);
drop function spark_outbox_lock(bigint[], text[]);
drop function spark_outbox_id_of(text);
