"""What `manage.py spark_bench` measures, and how: see `Bench` in bench/figures.py."""
