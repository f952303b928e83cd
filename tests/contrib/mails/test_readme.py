"""What the README of the mails shows is run."""

import re

import pytest
from django.contrib.auth.models import User
from django.core import mail as django_mail
from django.core.exceptions import ValidationError
from django.db import connection

from spark_outbox import api, emit
from spark_outbox.contrib.mails import templating
from spark_outbox.contrib.mails.models import Mail
from tests.test_readme import READMES, blocks

NAME = "spark_outbox/contrib/mails/README.md"
INSTALL, REGISTER, OTHERS, COPY, PORTED = blocks("python", NAME)

OLD = """


Dear {{ user }}

This is the key: {{ key }}
"""


@pytest.mark.usefixtures("recorded", "sender")
def test_the_examples_run(outbox, mail):
    names = {"INSTALLED_APPS": []}
    for block in (INSTALL, REGISTER, OTHERS):
        exec(block, names)
    mail("order_paid", body="{{ order.email }}")
    mail("order_sent")
    mail("invoice_written", subject="Invoice {{ number }}")
    order = User.objects.create(username="anna", email="anna@example.com")
    emit("order_paid", "paid", order=order)
    emit("order_sent", "sent", order=order)
    emit("invoice_written", number=5, to="bert@example.com", invoice="5 EUR")
    outbox.drain()
    shop = ["Store <store@shop.example>", "sales@shop.example"]
    assert sorted(sent.to[0] for sent in django_mail.outbox) == sorted(
        ["anna@example.com", "bert@example.com", *shop, *shop]
    )
    (invoice,) = (sent for sent in django_mail.outbox if sent.subject == "Invoice 5")
    assert invoice.attachments[0].content == "5 EUR"


@pytest.mark.usefixtures("recorded", "sender")
def test_mails_of_django_spark_are_ported(outbox, db):
    with connection.cursor() as cursor:
        cursor.execute("create table spark_mails_mail (event_group varchar, template_source text)")
        cursor.execute("insert into spark_mails_mail values ('stuff', %s)", [OLD])
    exec(COPY, {})
    names = {}
    exec("from spark_outbox.contrib import mails", names)
    exec(PORTED, names)
    user = User.objects.create(username="anna", email="anna@example.com")
    context = {"user": user, "key": "asdf", "spark_mail": {"to": [user.email, "b@example.com"]}}
    emit("stuff", "one", context=context)
    api.process_events(
        [{"group": "stuff", "key": "two", "user": user, "spark_mail": {"to": user.email}}]
    )
    outbox.drain()
    assert {sent.subject for sent in django_mail.outbox} == {"Dear anna"}
    bodies = sorted(sent.body for sent in django_mail.outbox)
    assert bodies == [*["This is the key: asdf"] * 2, "This is the key: two"]


def test_a_template_of_django_spark_that_loads_something_is_told(db):
    with connection.cursor() as cursor:
        cursor.execute("create table spark_mails_mail (event_group varchar, template_source text)")
        cursor.execute("insert into spark_mails_mail values ('stuff', 'Hi\n\n{%% load i18n %%}')", [])
    with pytest.raises(ValidationError, match="load"):
        exec(COPY, {})
    assert not Mail.objects.exists()


def test_all_tags_are_in_the_readme():
    (listed,) = re.findall(r"and the tags (.*?)\.", READMES[NAME], re.DOTALL)
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(templating.TAGS)
