"""The database goes away, comes back, or lacks its tables: what a worker does meanwhile."""

import os
import signal

import psycopg
import pytest

from tests.tools import WorkerProcess, eventually, manage

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_worker_outlives_its_database(own_server, mode):
    url, stop, start = own_server

    def query(sql):
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(sql).fetchone()[0]

    def handled():
        return query("select count(*) from challenges_handled")

    with WorkerProcess("--poll-interval", "3600", url=url) as worker:
        worker.wait_until_ready()
        query("select spark_emit('probe', 'before')")
        eventually(lambda: handled() == 1)
        stop(mode)
        eventually(lambda: worker.output.count("trying again") >= 3)  # it goes on trying
        assert worker.process.poll() is None
        start()
        worker.wait_until_ready()  # a new session LISTENs
        query("select spark_emit('probe', 'after')")
        eventually(lambda: handled() == 2)
        # Each pause is longer than the one before: it does not spin.
        assert worker.output.count("trying again") < 30
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


def test_a_worker_that_starts_before_its_database_waits_for_it(own_server):
    url, stop, start = own_server
    stop("fast")
    with WorkerProcess(url=url) as worker:
        eventually(lambda: "trying again" in worker.output)
        assert not worker.has_message()  # not READY
        start()
        worker.wait_until_ready()


def test_without_the_tables_the_worker_says_what_to_run(own_server):
    url, _, _ = own_server
    assert manage("migrate", "spark_outbox", "zero", url=url).returncode == 0
    try:
        with WorkerProcess(url=url) as worker:
            assert worker.wait() == os.EX_CONFIG
            assert "Run: manage.py migrate spark_outbox" in worker.output
    finally:
        manage("migrate", url=url)
