drop function spark_resume(text, text);
drop function spark_pause(text, text, text);
drop function spark_outbox_check_kind(text);
drop function spark_outbox_pause_mark(bigint);
