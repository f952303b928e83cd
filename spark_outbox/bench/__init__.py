"""The measurements of `manage.py spark_bench`. How they run: see `Bench` in bench/figures.py."""
