drop function spark_outbox_close_circuit(text);
