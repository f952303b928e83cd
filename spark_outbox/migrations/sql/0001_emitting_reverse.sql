drop function spark_outbox_ids_are_behind();
drop function spark_outbox_is_same;
drop function spark_outbox_digest;
drop function spark_outbox_emit_many;
drop function spark_emit(text, text, jsonb, jsonb);
drop function spark_outbox_check_keys(regclass, text[]);
drop function spark_outbox_check_home(regclass);
