alter table spark_outbox_delivery drop constraint spark_outbox_delivery_event_fk;

alter table spark_outbox_event reset (
    autovacuum_vacuum_scale_factor,
    autovacuum_vacuum_threshold,
    autovacuum_vacuum_insert_scale_factor,
    autovacuum_analyze_scale_factor
);
