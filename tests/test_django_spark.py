"""Code that was written for django-spark, with nothing changed but the import: its README's example, and
what projects do with it. The keys that it has handled: operating/test_porting.py."""

import copy
import functools
import io
import pickle
import re
import subprocess
import sys
from datetime import date, timedelta

import pytest
from django.contrib.auth.models import User
from django.core import mail
from django.core.mail import EmailMessage
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.template import Engine
from django.template.context import make_context
from django.test.utils import CaptureQueriesContext
from django.utils.translation import gettext_lazy

import spark_outbox
from spark_outbox import api
from spark_outbox.errors import InvalidEvent, RegistrationError, UnstorableValue
from spark_outbox.models import Event, OutboxEvent
from spark_outbox.registry.handlers import registry
from spark_outbox.testing import drain
from tests.challenges.models import Challenge
from tests.tools import deliveries, statuses

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


# Its versions: events were namespaces (0.1), then dicts (0.2), then dicts with a context (0.3)

SHAPES = {
    "0.1": (
        lambda challenge: api.Event(group="created", key=f"created_{challenge.pk}", challenge=challenge),
        lambda event: event.challenge,
    ),
    "0.2": (
        lambda challenge: {
            "group": "created",
            "key": f"created_{challenge.pk}",
            "challenge": challenge,
        },
        lambda event: event["challenge"],
    ),
    "0.3": (
        lambda challenge: {
            "group": "created",
            "key": f"created_{challenge.pk}",
            "context": {"challenge": challenge},
        },
        lambda event: event["context"]["challenge"],
    ),
}


@pytest.fixture(params=SHAPES)
def shape(request, own_registry):
    """A source that yields events of one shape, and what a handler has read of them."""
    make, read = SHAPES[request.param]
    seen = []

    def handle(event):
        seen.append((event["key"], read(event)))

    api.register_model_event_source(sender=Challenge, source=lambda challenge: [make(challenge)])
    for group in ("^created", "^something_else"):
        api.register_group_handler(handler=handle, group=group)
    return seen


def test_a_saved_instance_is_handled_once_in_every_shape(shape):
    challenge = make_challenge()
    event = Event.objects.get()
    assert (event.key, event.group, str(event)) == (f"created_{challenge.pk}", "created", event.key)
    challenge.save()
    (source,) = api.MODEL_SOURCES[Challenge]
    api.process_events(source(challenge))
    api.process_events(api.only_new_events(source(challenge)))
    drain()
    assert shape == [(event.key, challenge)]
    assert Event.objects.count() == 1


def test_a_handler_that_fails_costs_a_delivery_and_not_the_save(shape):
    def crash(event):
        raise NotImplementedError

    api.register_group_handler(handler=crash, group="")
    challenge = make_challenge()
    drain(raise_exceptions=False)
    assert shape == [(f"created_{challenge.pk}", challenge)]
    assert deliveries()[f"{HERE}.{crash.__qualname__}:"] == ("pending", 1)


def test_a_handler_of_two_matching_patterns_runs_twice(own_registry):
    seen = []

    def handle(event):
        seen.append(event["key"])

    for group in ("^created", "ted"):
        api.register_group_handler(handler=handle, group=group)
    api.process_events([{"group": "created", "key": "k"}])
    drain()
    assert seen == ["k", "k"]


# Ordinary code


def handled(own_registry, *items, handler=None):
    """Return what a handler gets of these events."""
    seen = []
    api.register_group_handler(handler=handler or seen.append, group="", name="it")
    api.process_events(items)
    drain()
    return seen


def test_a_handlers_event_is_a_dict_that_may_be_rendered_and_changed(own_registry):
    def handle(event):
        assert isinstance(event, dict)
        context = Engine().from_string("{{ challenge.title }} of {{ group }}")
        texts.append(context.render(make_context(event)))
        event["extra"] = 1
        event.extra += 1
        assert event.pop("extra") == 2
        event.update(more=event.pop("challenge").title)
        texts.append({**event})

    texts = []
    handled(own_registry, {"group": "g", "key": "k", "challenge": make_challenge()}, handler=handle)
    assert texts == ["Run of g", {"group": "g", "key": "k", "more": "Run"}]


def test_an_event_can_be_copied_pickled_and_read_as_a_namespace(own_registry):
    def handle(event):
        copies.extend([copy.copy(event), copy.deepcopy(event), pickle.loads(pickle.dumps(event))])
        copies.append(dict(vars(event)))
        assert "%(n)s" % event.__dict__ == "1"
        del event.n
        assert "n" not in event
        with pytest.raises(AttributeError, match="'n'"):
            del event.n

    copies = []
    event = {"group": "g", "key": "k", "n": 1, "challenge": make_challenge()}
    handled(own_registry, event, handler=handle)
    assert copies == [event] * 4
    assert copies[0].n == copies[1].n == copies[2].n == 1


def test_each_handler_gets_a_dict_of_its_own(own_registry):
    api.register_group_handler(handler=lambda event: event.clear(), group="")
    (event,) = handled(own_registry, {"group": "g", "key": "k", "n": [1]})
    assert event == {"group": "g", "key": "k", "n": [1]}
    assert (event.attempt, event.n, event.id) == (1, [1], Event.objects.get().pk)


def test_an_async_handler_gets_a_dict_too(own_registry):
    seen = []

    async def handle(event):
        seen.append((isinstance(event, dict), event["n"]))

    handled(own_registry, {"group": "g", "key": "k", "n": 1}, handler=handle)
    assert seen == [(True, 1)]


def test_options_of_emit_are_ordinary_names(own_registry):
    payload = {"delay": 3, "headers": ["a"], "ordering_key": 5, "available_at": None}
    api.register_model_event_source(
        sender=Challenge, source=lambda challenge: [{"group": "g", "key": "saved", **payload}]
    )
    make_challenge()
    found = handled(
        own_registry,
        {"group": "g", "key": "k", **payload},
        {"group": "g", "key": "in", "context": {"key": 1, "group": 2}},
        api.Event(group="g", key="a", delay=1),
    )
    assert [dict(event) for event in found] == [
        {"group": "g", "key": "saved", **payload},
        {"group": "g", "key": "k", **payload},
        {"group": "g", "key": "in", "context": {"key": 1, "group": 2}},
        {"group": "g", "key": "a", "delay": 1},
    ]
    assert found[-1].delay == 1


def test_options_of_an_event_of_our_own_are_kept(own_registry):
    api.process_events([spark_outbox.Event("g", "k", delay=60, n=1)])
    assert Event.objects.get().available_at is not None


def test_keys_and_groups_become_text(own_registry):
    found = handled(own_registry, {"group": gettext_lazy("Order"), "key": 5}, {"group": "g", "key": 5})
    assert [(event.group, event.key) for event in found] == [("Order", "5")]


@pytest.mark.parametrize("item", [{"key": "k"}, {"group": "g"}, {"group": "g", "key": None}, "g"])
def test_an_event_without_a_group_or_a_key_is_refused(item):
    with pytest.raises(InvalidEvent):
        api.process_events([item])


def test_the_same_source_may_be_registered_twice(registered):
    api.register_model_event_source(sender=Challenge, source=events_from_challenge)
    assert {Challenge: [events_from_challenge]} == api.MODEL_SOURCES
    make_challenge()
    drain()
    assert len(mails()) == 1


def test_a_sender_may_be_named(own_registry):
    api.register_model_event_source(sender="challenges.Challenge", source=events_from_challenge)
    assert list(api.MODEL_SOURCES) == [Challenge]
    with pytest.raises(ValueError, match="app_label"):
        api.register_model_event_source(sender="Challenge", source=events_from_challenge)


def test_handlers_may_be_changed_as_a_list(own_registry):
    first, second = Mailer("first").send, Mailer("second").send
    api.HANDLERS.append(("^a", first))
    api.HANDLERS.insert(0, ("^b", second))
    api.HANDLERS += [("^c", send_challenge_mails)]
    assert [("^b", second), ("^a", first), ("^c", send_challenge_mails)] == api.HANDLERS
    assert [handler.number for handler in own_registry.handlers] == [0, 1, 2]
    api.HANDLERS[-1] = ("^d", second)
    api.HANDLERS.remove(("^a", first))
    assert api.HANDLERS[:] == [("^b", second), ("^d", second)]
    api.HANDLERS[:1] = [("^e", first), ("^f", first)]
    assert [group for group, _ in api.HANDLERS] == ["^e", "^f", "^d"]
    assert [len(own_registry.handlers_for(group)) for group in "abcdef"] == [0, 0, 0, 1, 1, 1]
    api.HANDLERS.clear()
    assert api.HANDLERS == []
    assert own_registry.handlers_for("d") == ()


def described(of):
    return [(each.name, each.pattern, each.batch, each.adapt, each.function) for each in of.handlers]


def test_handlers_that_are_put_back_are_what_they_were(own_registry):
    def handle(event):
        """Do nothing."""

    spark_outbox.handler("^a", name="listed", batch=9)(handle)
    api.register_group_handler(
        group=re.compile("^a", re.IGNORECASE), handler=Mailer().send, name="named"
    )
    before = described(own_registry)
    for saved in (list(api.HANDLERS), api.HANDLERS[:], api.HANDLERS.copy(), copy.copy(api.HANDLERS)):
        api.HANDLERS[:] = [("^b", len)]
        api.HANDLERS.clear()
        api.HANDLERS.extend(saved)
        assert described(own_registry) == before
    with pytest.raises(RegistrationError, match="already"):
        api.HANDLERS[:] = [("^b", len), ("^b", len)]
    assert described(own_registry) == before


def test_what_cannot_be_stored_is_refused_with_the_cure():
    for value, cure in (
        (Challenge.objects.all(), "Store a list of instances"),
        (len, "Call it and store what it returns"),
        (Challenge(title="new"), r"Call its save\(\) before"),
        (EmailMessage("subject"), "Store plain values"),
    ):
        with pytest.raises(UnstorableValue, match=cure):
            api.process_events([{"group": "g", "key": "k", "context": {"it": value}}])


# Only new events


def test_create_if_new_keeps_a_key_and_leaves_the_event_to_its_caller(own_registry):
    api.register_group_handler(handler=lambda event: pytest.fail("twice"), group="")
    event = {"group": "g", "key": 5, "context": {"challenge": make_challenge(), "delay": 3}}
    created = Event.objects.create_if_new(event)
    assert (created.key, created.group, created.status) == ("5", "g", "done")
    assert Event.objects.create_if_new(event) is None
    drain()


def test_whoever_takes_new_events_handles_them_and_no_worker_does(own_registry):
    api.register_group_handler(handler=lambda event: pytest.fail("twice"), group="")
    items = [{"group": "g", "key": str(n), "context": {"n": n}} for n in range(5)]
    with CaptureQueriesContext(connection) as queries:
        sent = [event["context"]["n"] for event in api.only_new_events(items)]
    assert sent == [0, 1, 2, 3, 4]
    assert len(queries) == 5
    assert list(api.only_new_events(items)) == []
    drain()
    assert set(statuses().values()) == {"done"}


def test_new_events_may_hold_what_cannot_be_stored_unless_a_worker_is_to_handle_them():
    event = {"group": "g", "key": "k", "context": {"all": Challenge.objects.all(), "call": len}}
    (new,) = api.only_new_events([event])
    assert new == event
    assert Event.objects.create_if_new({**event, "key": "other"}).payload == {}
    with pytest.raises(UnstorableValue):
        api.process_events([new])
    with pytest.raises(UnstorableValue):
        api.process_events(api.only_new_events([{**event, "key": "third"}]))


def test_new_events_that_were_looked_at_may_be_processed(own_registry):
    seen = []
    api.register_group_handler(handler=lambda event: seen.append(event["n"]), group="")
    new = list(api.only_new_events({"group": "g", "key": str(n), "n": n} for n in range(4)))
    assert new[0] == {"group": "g", "key": "0", "n": 0}
    for _ in range(2):
        api.process_events(event for event in new if event["n"] % 2)
        drain()
    assert seen == [1, 3]
    api.process_events([{"group": "g", "key": "0"}])
    drain()
    assert seen == [1, 3]


def test_new_events_may_be_changed_and_made_anew_before_they_are_processed(own_registry):
    def change(event):
        event["n"] += 1
        event["group"] = "changed"
        return event

    for name, make in (
        ("1", change),
        ("2", dict),
        ("3", copy.copy),
        ("4", lambda event: {**event, "n": 2}),
        ("5", lambda event: {**event, "key": "another"}),
    ):
        api.process_events(map(make, api.only_new_events([{"group": "g", "key": name, "n": 1}])))
    found = handled(own_registry)
    assert [(event.group, event.key, event.n) for event in found] == [
        ("changed", "1", 2),
        ("g", "2", 1),
        ("g", "3", 1),
        ("g", "4", 2),
        ("g", "another", 1),
    ]


def test_new_events_are_handled_once_however_often_they_are_processed(own_registry):
    seen = []
    api.register_group_handler(handler=lambda event: seen.append(event.key), group="")
    with transaction.atomic():
        (lost,) = api.only_new_events([{"group": "g", "key": "lost"}])
        transaction.set_rollback(True)
    (event,) = api.only_new_events([{"group": "g", "key": "k"}])
    with transaction.atomic():
        api.process_events([event])
        transaction.set_rollback(True)
    for _ in range(2):
        api.process_events([lost, event, pickle.loads(pickle.dumps(event))])
        drain()
    assert sorted(seen) == ["k", "lost"]


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
