"""Optional apps. They import only what any project may import from spark_outbox."""
