-- The parts of the tables that Django's operations can't express.

-- A busy outbox updates its rows all the time: vacuum it often. By default, autovacuum would wait until
-- a fifth of the table is dead.
alter table spark_outbox_event set (
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.05,
    autovacuum_analyze_scale_factor = 0.05
);

-- The database itself deletes the deliveries of an event, also if plain SQL deletes the event.
alter table spark_outbox_delivery
    add constraint spark_outbox_delivery_event_fk
    foreign key (event_id) references spark_outbox_event (id) on delete cascade;
