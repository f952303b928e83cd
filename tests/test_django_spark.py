"""Porting from django-spark: its README's example, with nothing changed but the import."""

import functools
import io
import subprocess
import sys
from datetime import date, timedelta

import pytest
from django.contrib.auth.models import User
from django.core import mail
from django.core.mail import EmailMessage
from django.core.management import CommandError, call_command
from django.db import transaction

from spark_outbox import api
from spark_outbox.errors import RegistrationError
from spark_outbox.models import OutboxEvent
from spark_outbox.registry.handlers import registry
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


class Mailer:
    def __init__(self, sender=""):
        self.sender = sender

    def send(self, event):
        """Do nothing."""

    def __call__(self, event):
        """Do nothing."""


def make_handler(_template):
    def handle(event):
        """Do nothing."""

    return handle


def register_all(handlers, group=r"^challenge"):
    for handler in handlers:
        api.register_group_handler(handler=handler, group=group)


def names():
    return [handler.name for handler in registry.handlers]


HERE = "tests.test_django_spark"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: functools.partial(make_handler("")), "make_handler.<locals>.handle"),
        (lambda: functools.partial(send_challenge_mails), "send_challenge_mails"),
        (lambda: functools.partial(Mailer()), "Mailer"),
        (lambda: make_handler(""), "make_handler.<locals>.handle"),
        (lambda: Mailer(), "Mailer"),
        (lambda: Mailer().send, "Mailer.send"),
        (lambda: lambda event: None, "<lambda>.<locals>.<lambda>"),
    ],
)
def test_handlers_without_a_name_of_their_own_are_named_by_pattern_and_order(own_registry, make, name):
    handlers = [make() for _ in range(3)]
    expected = [f"{HERE}.{name}:^challenge{end}" for end in ("", "#2", "#3")]
    for _ in range(2):  # as in another process
        register_all(handlers)
        register_all(handlers[:1], group="^other")
        assert names() == [*expected, f"{HERE}.{name}:^other"]
        own_registry.clear()
    register_all([make() for _ in range(3)])
    assert names() == expected


def test_a_name_does_not_depend_on_handlers_of_other_patterns(own_registry):
    register_all([make_handler("a")], group="^a")
    register_all([make_handler("b")], group="^b")
    both = names()
    own_registry.clear()
    register_all([make_handler("b")], group="^b")
    assert names() == both[1:]


def test_a_function_keeps_its_own_name_and_is_registered_once_for_a_pattern(own_registry):
    register_all([send_challenge_mails])
    assert names() == [f"{HERE}.send_challenge_mails"]
    mailer = Mailer()
    for handler in (send_challenge_mails, mailer, mailer.send):
        register_all([handler], group="^b")
        with pytest.raises(RegistrationError, match="already"):
            register_all([handler], group="^b")


def test_functions_that_a_decorator_has_made_alike_are_told_apart_by_their_patterns(own_registry):
    def decorate(function):
        return functools.wraps(function)(lambda event: function(event))

    for group in ("^a", "^b"):
        register_all([decorate(send_challenge_mails)], group=group)
    assert names() == [f"{HERE}.send_challenge_mails", f"{HERE}.send_challenge_mails:^b"]


def test_handlers_may_be_given_names(own_registry):
    for name in ("first", "second"):
        api.register_group_handler(
            handler=functools.partial(send_challenge_mails), group="^a", name=name
        )
    assert names() == ["first", "second"]


def test_what_has_no_name_handles_events_and_is_retried(own_registry):
    seen = []

    class Handler:
        def __call__(self, event):
            seen.append(event.key)

    register_all([Handler(), functools.partial(seen.append), seen.append, Handler().__call__], group="")
    api.process_events([{"group": "g", "key": "k"}])
    drain()
    assert [each if isinstance(each, str) else each.key for each in seen] == ["k"] * 4


def test_sources_without_a_name_are_swept_and_reported(registered):
    def broken(_how, challenge):
        raise ValueError

    make_challenge()
    api.register_model_event_source(sender=Challenge, source=functools.partial(broken, 1))
    err = io.StringIO()
    with pytest.raises(CommandError):
        call_command("process_spark_sources", stderr=err, stdout=io.StringIO())
    assert "broken raised ValueError" in err.getvalue()


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
