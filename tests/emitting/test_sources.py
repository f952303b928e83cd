"""Sources: on every save, and in the sweep of process_spark_sources."""

import contextlib
import io
import os
import pty
import subprocess
import sys
from itertools import count, islice

import pytest
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.test.utils import isolate_apps
from django.utils.functional import lazy

from spark_outbox import Event, source
from spark_outbox.emitting.sources import emit_on_save, sweep
from spark_outbox.errors import InvalidEvent, SourceError
from spark_outbox.models import OutboxEvent
from spark_outbox.testing import drain, emitted
from tests.challenges.models import Challenge, Donation
from tests.probe.models import Basket, Crate, Express, Letter, Line, Pallet, Parcel, Tracked
from tests.tools import connect, conninfo, make_challenge, manage


def keys():
    return sorted(OutboxEvent.objects.values_list("key", flat=True))


# On save


@pytest.mark.django_db
def test_saving_an_instance_emits_what_its_sources_yield_once():
    challenge = make_challenge()
    challenge.save()
    assert keys() == [f"challenge_created_{challenge.pk}"]
    Donation.objects.create(challenge=challenge, amount=5)
    assert [event.group for event in emitted()] == ["challenge_created", "donation_received"]
    assert emitted("donation")[0]["challenge"] == challenge


@pytest.mark.django_db(transaction=True)
def test_the_events_are_emitted_in_the_savers_transaction():
    with transaction.atomic():
        make_challenge()
        assert len(keys()) == 1
        with connect() as other:
            assert other.execute("select count(*) from spark_outbox_event").fetchone() == (0,)
        transaction.set_rollback(True)
    assert keys() == []


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_the_events_are_emitted_in_the_savers_database():
    with transaction.atomic(using="other"):
        make_challenge(using="other")
        assert OutboxEvent.objects.using("other").count() == 1
        assert OutboxEvent.objects.using("default").count() == 0


@pytest.mark.django_db
def test_a_fixture_that_is_loaded_emits_nothing():
    challenge = make_challenge()
    OutboxEvent.objects.all().delete()
    emit_on_save(sender=Challenge, instance=challenge, using="default", raw=True)
    assert keys() == []


@pytest.mark.django_db
def test_a_source_that_raises_fails_the_save(own_registry):
    @source(Challenge)
    def broken(challenge):
        yield {"group": "fine", "key": "fine"}
        yield {"key": "no group"}

    with pytest.raises(InvalidEvent), transaction.atomic():
        make_challenge()
    assert not Challenge.objects.exists()
    assert keys() == []


def say(name, seen):
    """Return a source that notes for whom it spoke."""

    def speak(instance):
        seen.append((name, type(instance).__name__, instance.pk))
        yield {"group": name, "key": f"{name} {instance.pk}"}

    return speak


@pytest.mark.django_db
def test_a_source_of_a_class_speaks_for_its_subclasses_once_each(own_registry):
    seen = []
    for model in (Letter, Express, Parcel, Tracked):
        own_registry.add_source(say(f"of {model.__name__}", seen), model=model)
    everywhere = say("everywhere", seen)
    for model in (Letter, Express, Parcel, Tracked):
        own_registry.add_source(everywhere, model=model)

    def names(model):
        seen.clear()
        instance = model.objects.create()
        assert {row[1:] for row in seen} == {(model.__name__, instance.pk)}
        return [row[0] for row in seen]

    assert names(Pallet) == ["of Tracked", "everywhere"]
    assert names(Parcel) == ["of Tracked", "everywhere", "of Parcel"]
    assert names(Letter) == ["of Tracked", "everywhere", "of Parcel", "of Letter"]
    assert names(Express) == ["of Tracked", "everywhere", "of Parcel", "of Express"]


@pytest.mark.django_db
def test_an_instance_that_was_loaded_in_part_has_its_sources_too(own_registry):
    seen = []
    own_registry.add_source(say("of Parcel", seen), model=Parcel)
    letter = Letter.objects.create()
    Letter.objects.only("id").get().save(update_fields=["number"])
    assert seen == [("of Parcel", "Letter", letter.pk)] * 2


@pytest.mark.django_db
def test_a_source_sees_the_parent_of_a_child_whose_key_is_another(own_registry):
    seen = []
    own_registry.add_source(say("of Tracked", seen), model=Tracked)
    own_registry.add_source(say("of Parcel", seen), model=Parcel)
    own_registry.add_source(say("of Crate", seen), model=Crate)
    Parcel.objects.create()
    seen.clear()
    crate = Crate.objects.create()
    assert crate.pk != crate.id
    expected = [
        ("of Tracked", "Parcel", crate.id),
        ("of Parcel", "Parcel", crate.id),
        ("of Crate", "Crate", crate.pk),
    ]
    assert seen == expected
    seen.clear()
    run()
    assert seen[-3:] == expected


@pytest.mark.django_db
def test_a_source_of_an_abstract_model_speaks_for_models_that_are_defined_later(own_registry):
    own_registry.add_source(say("late", seen := []), model=Tracked)
    with isolate_apps("tests.probe"):

        class Late(Tracked):
            class Meta:
                app_label = "probe"

    emit_on_save(sender=Late, instance=Late(pk=5), using="default")
    assert seen == [("late", "Late", 5)]


# The sweep


def run(*arguments, **options):
    out, err = io.StringIO(), io.StringIO()
    error = None
    try:
        call_command("process_spark_sources", *arguments, stdout=out, stderr=err, **options)
    except CommandError as caught:
        error = caught
    return out.getvalue(), err.getvalue(), error


@pytest.fixture
def challenges(db):
    made = [make_challenge(f"{number}") for number in range(25)]
    OutboxEvent.objects.all().delete()
    return made


def test_the_sweep_emits_what_has_not_been_emitted_yet(challenges):
    challenges[0].save()
    out, err, error = run("--chunk-size", "10")
    assert (err, error) == ("", None)
    assert out.splitlines() == [
        "challenges.Challenge: 25 instances, 25 events, 24 new",
        "challenges.Donation: 0 instances, 0 events, 0 new",
        "spark_outbox_generators.Generator: 0 instances, 0 events, 0 new",
    ]
    assert len(keys()) == 25
    assert "25 instances, 25 events, 0 new" in run()[0]


def test_a_dry_run_counts_and_emits_nothing(challenges):
    challenges[0].save()
    out, _, _ = run("challenges.Challenge", "--dry-run")
    assert (
        out == "challenges.Challenge: 25 instances, 25 events, 24 new (dry run: nothing was emitted)\n"
    )
    assert len(keys()) == 1


def test_one_source_can_be_chosen_by_its_dotted_path_or_the_end_of_it(challenges, own_registry):
    @source(Challenge)
    def one(challenge):
        yield {"group": "one", "key": f"one {challenge.pk}"}

    @source(Challenge)
    def another_one(challenge):
        yield {"group": "another", "key": f"another {challenge.pk}"}

    run("--source", f"{one.__module__}.{one.__qualname__}")
    assert set(OutboxEvent.objects.values_list("group", flat=True)) == {"one"}
    OutboxEvent.objects.all().delete()
    run("--source", "another_one")
    assert set(OutboxEvent.objects.values_list("group", flat=True)) == {"another"}
    _, _, error = run("--source", "nope")
    assert f"There is no source 'nope'. Sources: {__name__}" in str(error)


def test_one_bad_event_is_reported_and_skipped_and_the_exit_code_is_1(challenges, own_registry):
    bad = challenges[7]

    @source(Challenge)
    def picky(challenge):
        yield {"group": "fine", "key": f"fine {challenge.pk}"}
        yield {"group": "g", "key": f"g {challenge.pk}", "x": object() if challenge == bad else 1}
        yield {"group": "after", "key": f"after {challenge.pk}"}

    @source(Challenge)
    def other(challenge):
        yield Event("other", f"other {challenge.pk}")

    out, err, error = run("--chunk-size", "10")
    assert out == "challenges.Challenge: 25 instances, 99 events, 99 new\n"
    assert err.count("\n") == 1
    assert f"challenges.Challenge {bad.pk}: " in err
    assert 'UnstorableValue: payload["x"] is a builtins.object' in err
    assert "Sources failed 1 times" in str(error)
    assert error.returncode == 1
    assert {f"fine {bad.pk}", f"after {bad.pk}"} < set(keys())


def test_a_source_for_sweeps_alone_is_not_called_by_save(db, own_registry):
    seen = []

    @source(Challenge, on_save=False)
    def slow(challenge):
        seen.append(challenge)
        yield {"group": "slow", "key": f"slow {challenge.pk}"}

    challenge = make_challenge()
    challenge.save()
    assert (seen, keys()) == ([], [])
    assert run("--source", "slow")[0] == "challenges.Challenge: 1 instances, 1 events, 1 new\n"
    assert (seen, keys()) == ([challenge], [f"slow {challenge.pk}"])


@pytest.mark.django_db
def test_a_source_for_sweeps_of_a_class_may_be_called_by_saves_of_a_subclass(own_registry):
    seen = []
    own_registry.add_source(say("it", seen), model=Parcel, on_save=False)
    own_registry.add_source(own_registry.sources[Parcel][0].func, model=Express)
    Parcel.objects.create()
    express = Express.objects.create()
    assert seen == [("it", "Express", express.pk)]
    assert run()[0].splitlines() == [
        "probe.Parcel: 2 instances, 2 events, 1 new",
    ]


@pytest.mark.parametrize("on_save", [True, False])
def test_an_event_that_makes_no_sense_costs_itself_alone(db, own_registry, on_save):
    @source(Basket, on_save=on_save)
    def odd(basket):
        yield {"group": "g", "key": f"1 {basket.pk}"}
        yield {"key": "no group"}
        yield {"group": "g", "key": f"2 {basket.pk}", "x": lazy(lambda: 1 / 0, str)()}
        yield {"group": "g", "key": f"3 {basket.pk}"}

    Basket.objects.bulk_create([Basket(), Basket()])
    out, err, _ = run()
    assert out == "probe.Basket: 2 instances, 4 events, 4 new\n"
    assert (err.count("InvalidEvent"), err.count("ZeroDivisionError")) == (2, 2)


def test_a_sweep_can_be_looked_at_after_each_chunk_of_events(db):
    make_challenge()
    endless = ({"group": "g", "key": f"{number}"} for number in count())
    sweeping = sweep(
        Challenge,
        [lambda _: endless],
        using="default",
        chunk_size=10,
        dry_run=True,
        on_error=lambda *_: None,
    )
    assert [(each.events, each.new) for each in islice(sweeping, 2)] == [(10, 10), (20, 20)]


def test_a_source_that_yields_much_is_written_in_chunks(challenges, own_registry):
    known = []

    @source(Challenge)
    def many(challenge):
        for number in range(25):
            known.append(OutboxEvent.objects.count())
            yield {"group": "many", "key": f"{challenge.pk} {number}"}
        if challenge == challenges[1]:
            raise SourceError("What is wrong: no data.")

    out, err, error = run("--chunk-size", "10")
    assert out == "challenges.Challenge: 25 instances, 625 events, 625 new\n"
    assert known[:40] == [0] * 10 + [10] * 10 + [20] * 10 + [30] * 10
    assert err.endswith("many raised SourceError: What is wrong: no data.\n")
    assert error.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["challenges.Nope"], "There is no model 'challenges.Nope'. Models with a source: challenges."),
        (["nope"], "There is no model 'nope'."),
        (["auth.User"], "auth.User has no source. Models with one: challenges.Challenge"),
        (["--chunk-size", "0"], "1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(db, arguments, message):
    _, _, error = run(*arguments)
    assert message in str(error)


def test_the_sweep_asks_each_source_once_about_each_row(db, own_registry):
    made = [model.objects.create() for model in (Parcel, Letter, Express, Pallet)]
    seen = []
    everywhere = say("everywhere", seen)
    for model in (Express, Parcel, Tracked):
        own_registry.add_source(everywhere, model=model)
        own_registry.add_source(say(f"of {model.__name__}", seen), model=model)
    out, err, error = run()
    assert (err, error) == ("", None)
    assert out.splitlines() == [
        "probe.Express: 1 instances, 1 events, 1 new",
        "probe.Parcel: 3 instances, 9 events, 9 new",
        "probe.Pallet: 1 instances, 2 events, 2 new",
    ]
    assert len(seen) == len(set(seen))
    assert [row[1:] for row in seen if row[0] == "everywhere"] == [
        *[("Parcel", parcel.pk) for parcel in made[:3]],
        ("Pallet", made[3].pk),
    ]


def test_the_sweep_of_one_model_asks_the_sources_of_its_bases_too(db, own_registry):
    seen = []
    own_registry.add_source(say("of Tracked", seen), model=Tracked)
    own_registry.add_source(say("of Parcel", seen), model=Parcel)
    Parcel.objects.create()
    express = Express.objects.create()
    seen.clear()
    assert run("probe.Express")[0] == "probe.Express: 1 instances, 2 events, 0 new\n"
    assert seen == [("of Tracked", "Express", express.pk), ("of Parcel", "Express", express.pk)]
    _, _, error = run("auth.User")
    assert "auth.User has no source. Models with one: probe.Parcel, probe.Pallet" in str(error)


def test_rows_with_composite_keys_are_swept_chunk_by_chunk(db, own_registry):
    basket = Basket.objects.create()
    Line.objects.bulk_create(Line(basket=basket, number=number) for number in range(7))
    own_registry.add_source(say("line", seen := []), model=Line)
    assert run("--chunk-size", "3")[0] == "probe.Line: 7 instances, 7 events, 7 new\n"
    assert [row[2] for row in seen] == [(basket.pk, number) for number in range(7)]


def test_the_sweep_is_streamed_in_constant_memory(challenges, django_assert_num_queries):
    def forget(*_):
        raise AssertionError

    with django_assert_num_queries(3 + 3 * 3):  # per chunk: a page, a savepoint's two, an insert
        chunks = sweep(
            Challenge,
            [lambda challenge: [{"group": "g", "key": f"{challenge.pk}"}]],
            using="default",
            chunk_size=10,
            dry_run=False,
            on_error=forget,
        )
        counts = [count.instances for count in chunks]
    assert counts == [10, 20, 25]


@pytest.mark.django_db(transaction=True)
def test_no_transaction_or_cursor_is_open_between_chunks(own_registry):
    for number in range(5):
        make_challenge(f"{number}")
    states = []

    @source(Challenge)
    def look(challenge):
        states.append(connection.in_atomic_block)
        yield {"group": "g", "key": f"{challenge.pk}"}

    run("--chunk-size", "2")
    assert states == [False] * 5
    assert len(keys()) == 5


@pytest.mark.django_db(transaction=True)
def test_a_progress_bar_is_shown_on_a_terminal_and_only_there(tmp_path):
    for number in range(5):
        make_challenge(f"{number}")
    assert "█" not in manage("process_spark_sources").stderr

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, settings.BASE_DIR / "manage.py", "process_spark_sources", "--chunk-size", "2"],
        env={**os.environ, "DATABASE_URL": conninfo(), "DJANGO_SETTINGS_MODULE": "tests.settings"},
        stdout=subprocess.DEVNULL,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    try:
        while block := os.read(leader, 4096):
            shown += block
    except OSError:  # the other side is closed
        pass
    assert process.wait() == 0
    assert "██" in shown.decode()
    assert "2/5" in shown.decode()
    assert "5/5" in shown.decode()


# Adopting the outbox in a project that is there already


@pytest.mark.django_db(transaction=True)
def test_what_was_there_before_is_written_as_done_and_never_handled(own_registry):
    calls = []
    for number in range(5):
        make_challenge(f"{number}")

    @source(Challenge)
    def placed(challenge):
        yield {"group": "placed", "key": f"placed_{challenge.pk}", "challenge": challenge}

    own_registry.add_handler(lambda event: calls.append(event.key), group="", name="h")
    assert "5 instances, 5 events, 5 new, as done" in run("--as-done")[0]
    assert set(OutboxEvent.objects.values_list("status", flat=True)) == {"done"}
    assert not OutboxEvent.objects.filter(finished_at=None).exists()
    assert "5 events, 0 new" in run()[0]
    new = make_challenge("new")
    drain()
    assert calls == [f"placed_{new.pk}"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("answer", "options", "emitted"),
    [
        ("n", [], 0),
        ("y", [], 5),
        (None, ["--yes"], 5),
        (None, ["--as-done"], 5),
        (None, ["--dry-run"], 0),
    ],
)
def test_the_first_sweep_asks_on_a_terminal(answer, options, emitted):
    for number in range(5):
        make_challenge(f"{number}")
    OutboxEvent.objects.all().delete()
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, settings.BASE_DIR / "manage.py", "process_spark_sources", *options],
        env={**os.environ, "DATABASE_URL": conninfo(), "DJANGO_SETTINGS_MODULE": "tests.settings"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    said = ""
    with contextlib.suppress(OSError):  # the other side is closed
        while block := os.read(leader, 4096):
            said += block.decode()
            if answer and "[y/N]" in said and "\n" not in said.partition("[y/N]")[2]:
                os.write(leader, f"{answer}\n".encode())
    os.close(leader)
    assert process.wait() == (1 if answer == "n" else 0)
    assert ("give --as-done" in said.replace("\r\n", " ")) == bool(answer)
    assert OutboxEvent.objects.count() == emitted
    if emitted and answer:  # now they are known
        assert "[y/N]" not in manage("process_spark_sources").stdout
