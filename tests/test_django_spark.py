"""Porting from django-spark: its README's example, with nothing changed but the import."""

import subprocess
import sys
from datetime import date, timedelta

import pytest
from django.contrib.auth.models import User
from django.core import mail
from django.core.mail import EmailMessage
from django.db import transaction

from spark_outbox import api
from spark_outbox.models import OutboxEvent
from spark_outbox.testing import drain
from tests.challenges.models import Challenge

pytestmark = [
    pytest.mark.django_db,
    # Django 6.1 deprecates what the README's example passes to send(), and projects without MAILERS.
    pytest.mark.filterwarnings("ignore:The 'fail_silently' argument is deprecated"),
    pytest.mark.filterwarnings("ignore:Django 2028 will not have a default mailer"),
]


# As in django-spark's README


def events_from_challenge(challenge):
    if not challenge.is_active:
        return

    yield {
        "group": "challenge_created",
        "key": "challenge_created_%s" % challenge.pk,
        # Attach any metadata to the Event (it is a types.SimpleNamespace)
        "challenge": challenge,
    }

    if (date.today() - challenge.start_date).days > 2 and challenge.donations.count() < 2:
        yield {
            "group": "challenge_inactivity_2d",
            "key": "challenge_inactivity_2d_%s" % challenge.pk,
            "challenge": challenge,
        }

    if (challenge.end_date - date.today()).days <= 2:
        yield {
            "group": "challenge_ends_2d",
            "key": "challenge_ends_2d_%s" % challenge.pk,
            "challenge": challenge,
        }

    if challenge.end_date < date.today():
        yield {
            "group": "challenge_ended",
            "key": "challenge_ended_%s" % challenge.pk,
            "challenge": challenge,
        }


def render_to_mail(template, context, **options):
    """Stand in for django-authlib's: the same call, the template's name as the body."""
    return EmailMessage(context["challenge"].title, template, **options)


def send_challenge_mails(event):
    render_to_mail(
        # Different mail text per event group:
        "challenges/mails/%s" % event["group"],
        {
            "challenge": event["challenge"],
        },
        to=[event["challenge"].user.email],
    ).send(fail_silently=True)


@pytest.fixture
def registered(own_registry):
    api.register_group_handler(
        handler=send_challenge_mails,
        group=r"^challenge",
    )
    api.register_model_event_source(
        sender=Challenge,
        source=events_from_challenge,
    )


def make_challenge(**dates):
    user, _ = User.objects.get_or_create(username="anna", email="anna@example.com")
    today = date.today()
    return Challenge.objects.create(
        title="Run",
        user=user,
        **{"start_date": today, "end_date": today + timedelta(days=9), **dates},
    )


def mails():
    return [(message.body, message.to) for message in mail.outbox]


def test_the_readmes_example_sends_its_mails_once(registered):
    challenge = make_challenge()
    challenge.save()
    drain()
    assert mails() == [("challenges/mails/challenge_created", ["anna@example.com"])]

    challenge.start_date = date.today() - timedelta(days=5)
    challenge.end_date = date.today() - timedelta(days=1)
    for _ in range(3):
        challenge.save()
        drain()
    assert [body.rpartition("/")[2] for body, _ in mails()] == [
        "challenge_created",
        "challenge_inactivity_2d",
        "challenge_ends_2d",
        "challenge_ended",
    ]


def test_the_readmes_loop_over_all_sources_runs(registered):
    make_challenge()
    OutboxEvent.objects.all().delete()
    for model, sources in api.MODEL_SOURCES.items():
        for instance in model.objects.all():
            for source in sources:
                api.process_events(source(instance))
    drain()
    assert len(mails()) == 1


def test_handlers_are_listed_as_pairs_of_pattern_and_function(registered):
    assert list(api.HANDLERS) == [(r"^challenge", send_challenge_mails)]
    assert len(api.HANDLERS) == 1
    for group, handler in api.HANDLERS:
        assert (group, handler) == api.HANDLERS[0]


def test_one_handler_may_be_registered_for_several_patterns(registered):
    api.register_group_handler(handler=send_challenge_mails, group=r"^something_else")
    assert len(api.HANDLERS) == 2


def test_an_event_offers_what_django_sparks_events_did(own_registry):
    seen = []
    api.register_group_handler(handler=seen.append, group="")
    challenge = make_challenge()
    api.process_events([api.Event(group="g", key="k", challenge=challenge, n=None)])
    drain()
    (event,) = seen
    assert event["challenge"] == event.challenge == challenge
    assert (event["group"], event.group, event["key"], event.key) == ("g", "g", "k", "k")
    assert event.get("challenge") == challenge
    assert (event.get("n", 5), event.get("missing"), event.get("missing", 5)) == (None, None, 5)
    assert "challenge" in event
    assert "group" in event
    assert "missing" not in event
    assert dict(event) == {"group": "g", "key": "k", "challenge": challenge, "n": None}
    with pytest.raises(KeyError):
        event["missing"]
    with pytest.raises(AttributeError, match="missing"):
        event.missing  # noqa: B018


def test_an_event_with_a_context_has_the_shape_of_django_spark_0_3(own_registry):
    seen = []
    api.register_group_handler(
        handler=lambda event: seen.append(event["context"]["challenge"]), group=""
    )
    challenge = make_challenge()
    event = api.event("challenge_created", challenge.pk, {"challenge": challenge})
    assert event == {
        "group": "challenge_created",
        "key": f"challenge_created_{challenge.pk}",
        "context": {"challenge": challenge},
    }
    assert api.event("g", 1)["context"] == {}
    api.process_events([event])
    drain()
    assert seen == [challenge]


def test_only_new_events_lets_each_key_pass_once():
    def events():
        yield {"group": "g", "key": "1"}
        yield {"group": "g", "key": "1"}
        yield api.Event(group="g", key="2")

    assert [event["key"] for event in api.only_new_events(events())] == ["1", "2"]
    assert list(api.only_new_events(events())) == []


def test_process_events_of_only_new_events_has_them_handled_once(own_registry):
    seen = []
    api.register_group_handler(handler=lambda event: seen.append(event.key), group="")
    for _ in range(2):
        api.process_events(api.only_new_events([{"group": "g", "key": "1"}]))
        drain()
    assert seen == ["1"]


@pytest.mark.django_db(transaction=True)
def test_with_dispatch_on_commit_events_are_handled_in_process_as_in_django_spark(registered, settings):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}
    with transaction.atomic():
        make_challenge()
        assert mails() == []
    assert len(mails()) == 1


def test_the_api_can_be_imported_before_apps_are_ready():
    code = (
        "import spark_outbox, spark_outbox.api as api\n"
        "from spark_outbox import emit, handler, source, Event\n"
        "api.register_group_handler(handler=print, group='x')\n"
        "from django.apps import apps; assert not apps.ready\n"
        "from django.conf import settings; assert not settings.configured\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
