drop view spark_outbox_status;
