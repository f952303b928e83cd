"""The README of generators: its examples run."""

from datetime import date, timedelta

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import IntegrityError, connection, transaction

from spark_outbox.contrib.generators.models import Condition, Generator
from spark_outbox.contrib.generators.preview import LOOKED_AT, SHOWN
from spark_outbox.contrib.generators.sources import events_of
from spark_outbox.testing import drain, emitted
from tests.challenges.models import Challenge
from tests.test_readme import READMES, blocks

NAME = "spark_outbox/contrib/generators/README.md"


@pytest.mark.django_db
@pytest.mark.usefixtures("register")
def test_the_python_blocks_run(own_registry, generate):
    sent = []
    own_registry.add_source(events_of, model=Generator, on_save=False)
    names = {"__package__": "tests.challenges", "mail": lambda user, text: sent.append((user, text))}
    for code in blocks("python", NAME):
        exec(compile(code, NAME, "exec"), names)
    anna, today = User.objects.create(username="anna"), date.today()
    for days in (1, 2, 3):
        end = today + timedelta(days=days)
        Challenge.objects.create(title="Run", user=anna, start_date=today, end_date=end)
    generate("challenge_reminder", ("days_left", "=", "2"), ("donations", "<", "1"))
    for _ in range(2):
        call_command("process_spark_sources", verbosity=0)
        drain()
    assert sent == [(anna, "Your challenge ends in 2 days.")]


OLD = """
create table spark_generators_generator (id serial primary key, "group" varchar(50), source varchar(50));
create table spark_generators_condition (
    id serial primary key, variable varchar(50), operator varchar(10), value integer,
    generator_id integer references spark_generators_generator
);
insert into spark_generators_generator values (7, 'long', 'challenges'), (9, 'all', 'challenges');
insert into spark_generators_condition values (5, 'length', '>', 1, 7), (3, 'length', '<=', 30, 7);
"""


@pytest.mark.django_db
def test_the_sql_copies_the_tables_of_django_spark(register, generate):
    register()
    with connection.cursor() as cursor:
        cursor.execute(OLD)
        cursor.execute(*blocks("sql", NAME))
    found = {each.group: [str(c) for c in each.conditions.all()] for each in Generator.objects.all()}
    assert found == {"long": ["length <= 30", "length > 1"], "all": []}
    assert not Generator.objects.filter(is_active=True).exists()
    for condition in Condition.objects.all():
        condition.full_clean()
    assert generate("new").pk == 10
    with pytest.raises(IntegrityError), transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(*blocks("sql", NAME))  # a second time: nothing is copied
    assert Condition.objects.count() == 2
    assert not emitted()


def test_what_it_says_is_so():
    text = " ".join(READMES[NAME].split())
    assert f"the first {LOOKED_AT} candidates" in text
    assert f"It shows {SHOWN} of each kind" in text
