"""Generators in the admin: defining one in two steps, what the forms refuse, and the preview."""

import re
from decimal import Decimal
from itertools import count

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.utils import translation

from spark_outbox import emit
from spark_outbox.contrib.generators import Variable
from spark_outbox.contrib.generators.models import Generator
from spark_outbox.contrib.generators.preview import LOOKED_AT, SHOWN
from spark_outbox.models import OutboxEvent
from tests.admin.pages import get, listed, words
from tests.challenges.models import Challenge
from tests.tools import make_challenge

ROOT = "/admin/spark_outbox_generators/generator/"


def conditions(*rows, generator=None, **more):
    """Return the fields of the form of a generator with these conditions, which may be stored ones."""
    stored = list(generator.conditions.all()) if generator else []
    fields = {"conditions-TOTAL_FORMS": len(rows), "conditions-INITIAL_FORMS": len(stored)}
    for number, (variable, operator, value) in enumerate(rows):
        row = {"variable": variable, "operator": operator, "value": value}
        if number < len(stored):
            row |= {"id": stored[number].pk, "generator": generator.pk}
        fields |= {f"conditions-{number}-{name}": given for name, given in row.items()}
    return {**fields, **more}


def save(admin, generator, *rows, **more):
    """Send the form; return the errors that it comes back with."""
    data = conditions(*rows, generator=generator, group=generator.group, is_active="on", **more)
    answer = admin.post(f"{ROOT}{generator.pk}/change/", data)
    if answer.status_code == 302:
        return []
    found = re.findall(r'<ul class="errorlist[^"]*"[^>]*>(.*?)</ul>', answer.text, re.DOTALL)
    return [words(each) for each in found]


# Defining one


def test_a_generator_is_defined_in_two_steps(admin, register):
    register(verbose_name="all challenges", variables={"length": Variable(int, "of its title")})
    page = get(admin, "add/", ROOT)
    assert '<option value="challenges">all challenges</option>' in page
    assert "conditions-0" not in page
    answer = admin.post(f"{ROOT}add/", {"group": "long", "source": "challenges"})
    generator = Generator.objects.get()
    assert answer.url == f"{ROOT}{generator.pk}/change/"
    assert not generator.is_active
    page = get(admin, f"{generator.pk}/change/", ROOT)
    assert "length (whole number) of its title" in words(page)
    assert '<option value="length">length</option>' in page
    assert save(admin, generator, ("length", ">=", " 02 ")) == []
    generator.refresh_from_db()
    assert generator.is_active
    assert [str(each) for each in generator.conditions.all()] == ["length >= 2"]


def test_a_source_that_is_not_registered_is_refused(admin, register):
    register()
    answer = admin.post(f"{ROOT}add/", {"group": "g", "source": "other"})
    assert "Select a valid choice. other is not one of the available choices." in answer.text
    assert not Generator.objects.exists()


def test_a_group_is_for_one_source_since_keys_could_be_the_same(admin, register, generate):
    register()
    register("others")
    generate("g")
    answer = admin.post(f"{ROOT}add/", {"group": "g", "source": "others"})
    assert "This group is used with the source “challenges”: keys could be the same." in words(
        answer.text
    )
    assert admin.post(f"{ROOT}add/", {"group": "g", "source": "challenges"}).status_code == 302
    other = generate("h", source="others", is_active=False)
    answer = admin.post(f"{ROOT}{other.pk}/change/", conditions(group="g"))
    assert "This group is used with the source “challenges”" in words(answer.text)


def test_a_clash_that_is_there_is_shown_and_can_be_ended(admin, register, generate):
    register()
    register("others")
    one, other = generate("g"), generate("g", source="others")
    assert [each[:33] for each in listed(get(admin, "", ROOT), "problems")] == [
        "This group is used with the sourc"
    ] * 2
    assert "“others”: keys could be the same." in words(get(admin, f"{one.pk}/change/", ROOT))
    assert admin.post(f"{ROOT}{other.pk}/change/", conditions(group="g")).status_code == 302
    assert admin.post(f"{ROOT}{other.pk}/change/", conditions(group="h")).status_code == 302
    assert listed(get(admin, "", ROOT), "problems") == ["-", "-"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("length", ">", "five"), "Enter a whole number."),
        (("length", ">", ""), "This field is required."),
        (("length", "~", "5"), "Select a valid choice. ~ is not one of the available choices."),
        (("length", "", "5"), "This field is required."),
        (("", ">", "5"), "This field is required."),
        (("pk", ">", "5"), "The source has no such variable."),
        (("__class__", "=", "5"), "The source has no such variable."),
        (("flag", ">", "true"), "This variable can only be compared by = and !=."),
        (("flag", "=", "perhaps"), "Enter true or false."),
        (("title", "=", "x" * 256), "Ensure this value has at most 255 characters (it has 256)."),
        (("title", "=", "x\x00"), "Null characters are not allowed."),
        (("sum", "=", "NaN"), "Enter a number."),
        (("sum", "=", "9" * 200), "Ensure that there are no more than 100 digits in total."),
    ],
)
def test_a_wrong_condition_is_an_error_of_the_form(admin, register, generate, row, message):
    register(variables={"length": int, "title": str, "flag": bool, "sum": Decimal})
    generator = generate()
    assert message in save(admin, generator, row)
    assert not generator.conditions.exists()


@pytest.mark.parametrize("group", ["", "g" * 201, "a\x00"])
def test_a_wrong_group_is_an_error_of_the_form(admin, register, group):
    register()
    assert admin.post(f"{ROOT}add/", {"group": group, "source": "challenges"}).status_code == 200


def test_a_variable_that_is_gone_is_shown_and_has_to_be_mended(admin, register, generate):
    register()
    generator = generate("g", ("gone", ">", "5"))
    page = get(admin, f"{generator.pk}/change/", ROOT)
    assert '<option value="gone" selected>gone</option>' in page
    assert "gone > 5: The source has no such variable." in words(page)
    assert save(admin, generator, ("gone", ">", "5")) == ["The source has no such variable."]
    assert save(admin, generator, ("length", ">", "5")) == []
    assert [str(each) for each in generator.conditions.all()] == ["length > 5"]


def test_the_list_shows_what_is_wrong_and_deactivates(admin, register, generate):
    register()
    broken = generate("broken", ("gone", ">", "5"), ("length", "=", "x"))
    lost = generate("lost", source="other")
    generate("works", ("length", ">", "5"), ("title", "!=", "<b>"))
    page = get(admin, "", ROOT)
    assert listed(page, "group") == ["broken", "works", "lost"]
    assert listed(page, "conditions_text") == [
        "gone > 5 and length = x",
        "length > 5 and title != <b>",
        "-",
    ]
    assert listed(page, "problems") == [
        "gone > 5: The source has no such variable. length = x: Enter a whole number.",
        "-",
        "The source “other” is not registered.",
    ]
    data = {"form-TOTAL_FORMS": 2, "form-INITIAL_FORMS": 2, "_save": "Save"}
    data |= {"form-0-id": broken.pk, "form-1-id": lost.pk}
    assert admin.post(ROOT, data).status_code == 302
    assert list(Generator.objects.filter(is_active=True).values_list("group", flat=True)) == ["works"]


def test_a_generator_whose_source_is_gone_has_a_page(admin, register, generate):
    lost = generate("lost", ("length", ">", "5"), source="gone")
    assert "The source “gone” is not registered." in words(get(admin, f"{lost.pk}/change/", ROOT))
    assert "The source “gone” is not registered." in words(get(admin, f"{lost.pk}/preview/", ROOT))
    assert "The source “gone” is not registered." in save(admin, lost, ("length", ">", "5"))


def test_the_list_takes_few_queries(admin, register, generate, django_assert_num_queries):
    register()
    for number in range(20):
        generate(f"g{number}", ("length", ">", "5"))
    with django_assert_num_queries(6):
        get(admin, "", ROOT)


# The preview


def preview(client, generator, status=200):
    return words(get(client, f"{generator.pk}/preview/", ROOT, status))


def test_the_preview_says_what_would_be_emitted_what_is_known_and_why_not(admin, register, generate):
    def context(challenge):
        if challenge.title == "broken":
            raise ValueError("secret")
        return {"length": len(challenge.title) if challenge.title != "?" else None}

    register(context=context, variables={"length": int})
    _, bb, ccc, _, _ = (make_challenge(title) for title in ("a", "bb", "<ccc>", "broken", "?"))
    OutboxEvent.objects.all().delete()
    generator = generate("long", ("length", ">", "1"), is_active=False)
    emit("long", f"long_{bb.pk}")
    said = preview(admin, generator)
    assert "It is not active: nothing is emitted. Candidates: 5." in said
    assert f"Would be emitted: 1 <ccc> long_{ccc.pk} Known already: 1 bb long_{bb.pk}" in said
    assert "Conditions not met: 2 a Not length > 1: it is 1. ? Not length > 1: it is None." in said
    assert "Failed: 1 broken ValueError at " in said
    assert "secret" not in said
    assert OutboxEvent.objects.count() == 1
    Generator.objects.update(is_active=True)
    assert "The next sweep emits what is new." in preview(admin, generator)


def test_the_preview_knows_which_candidates_come_twice_or_can_not_be_stored(admin, register, generate):
    def context(challenge):
        return {"length": 1, "x": object() if challenge.title == "odd" else None}

    register(candidates=lambda: [*Challenge.objects.order_by("pk")] * 2, context=context)
    challenge, _ = make_challenge("a"), make_challenge("odd")
    said = preview(admin, generate())
    key = f"long_{challenge.pk}"
    assert f"Would be emitted: 1 a {key} Known already: 1 a {key} Failed: 2 odd payload" in said


def test_the_preview_says_why_a_key_will_not_do(admin, register, generate):
    register(key=lambda challenge: challenge.title)
    make_challenge("x" * 51)
    said = preview(admin, generate("g" * 200))
    assert "The key must have 1 to 255 characters" not in said
    make_challenge("x" * 55)
    assert "The key must have 1 to 255 characters" in preview(admin, Generator.objects.get())


def test_the_preview_reads_a_bounded_number_of_candidates(admin, register, generate):
    endless = {
        "candidates": count,
        "context": lambda n: {"n": n},
        "variables": {"n": int},
    }
    register("endless", **endless, key=str)
    said = preview(admin, generate("g", source="endless"))
    assert f"These are the first {LOOKED_AT} candidates. Would be emitted: {LOOKED_AT} 0 g_0" in said
    assert said.count(" g_") == SHOWN
    register()
    Challenge.objects.bulk_create(make_unsaved(f"{number}") for number in range(LOOKED_AT + 1))
    with connection.execute_wrapper(lambda go, sql, *rest: limits(sql) or go(sql, *rest)):
        said = preview(admin, generate("long", ("length", ">", "9")))
    assert f"Conditions not met: {LOOKED_AT}" in said
    assert [f"LIMIT {LOOKED_AT}"] == LIMITS
    LIMITS.clear()


LIMITS = []


def limits(sql):
    if 'FROM "challenges_challenge"' in sql:
        LIMITS.append(sql[sql.index("LIMIT") :])


def make_unsaved(title):
    made = make_challenge("x")
    return Challenge(title=title, start_date=made.start_date, end_date=made.end_date)


@pytest.mark.parametrize("candidates", [lambda: 1 / 0, lambda: Challenge.objects.extra(where=["nope"])])
def test_candidates_that_can_not_be_read_are_a_problem_of_it(admin, register, generate, candidates):
    register(candidates=candidates)
    assert "A look at the candidates ended with: " in preview(admin, generate())


def test_a_context_that_breaks_the_transaction_ends_the_look(admin, register, generate):
    def context(challenge):
        if challenge.title == "b":
            Challenge.objects.get(pk=1 / 3 if challenge.pk else None, title__regex="(")
        return {"length": 1}

    register(context=context)
    make_challenge("a")
    make_challenge("b")
    said = preview(admin, generate())
    assert "A look at the candidates ended with: " in said
    assert "Would be emitted: 1 a" in said


def test_the_preview_leaves_nothing_that_a_context_writes(admin, register, generate):
    register(context=lambda challenge: {"length": challenge.delete()[0]}, variables={"length": int})
    make_challenge("a")
    preview(admin, generate())
    assert Challenge.objects.count() == 1


def test_the_preview_has_a_permission_of_its_own(client, member, register, generate):
    register()
    generator = generate()
    client.force_login(member("view_generator"))
    assert "What it would emit now" not in get(client, "", ROOT)
    assert "What it would emit now" not in get(client, f"{generator.pk}/change/", ROOT)
    preview(client, generator, status=403)
    client.force_login(member("preview_generator", name="bert"))
    preview(client, generator, status=403)
    client.force_login(member("view_generator", "preview_generator", name="carl"))
    page = get(client, "", ROOT)
    assert f'href="{ROOT}{generator.pk}/preview/">What it would emit now</a>' in page
    preview(client, generator)
    get(client, "0/preview/", ROOT, status=404)
    get(client, "x/preview/", ROOT, status=404)
    assert admin_add(client) == 403
    client.force_login(member("add_generator", name="dora"))  # may not see its page
    assert client.post(f"{ROOT}add/", {"group": "g", "source": "challenges"}).url == "/admin/"


def admin_add(client):
    return client.post(f"{ROOT}add/", {"group": "g", "source": "challenges"}).status_code


@pytest.mark.django_db(transaction=True)
def test_a_role_that_may_not_read_keys_is_told_so(logins, register, generate):
    register()
    challenge = make_challenge("a")
    generator = generate()
    client = Client()
    client.force_login(User.objects.create_superuser("boss", password="boss"))
    with logins.django("emitter"):
        said = preview(client, generator)
    assert "The role of this database connection may not read keys." in said
    assert f"Would be emitted: 1 a long_{challenge.pk}" in said


def test_pages_are_in_the_language_of_the_browser(admin, register, generate):
    register()
    generator = generate("long", ("length", ">", "1"))
    make_challenge("a")
    german = {"accept-language": "de"}
    with translation.override(None):  # what a request activates stays
        said = words(admin.get(f"{ROOT}{generator.pk}/preview/", headers=german).text)
        assert "Bedingungen nicht erfüllt: 1 a Nicht length > 1: der Wert ist 1." in said
        said = words(admin.get(f"{ROOT}{generator.pk}/change/", headers=german).text)
        assert "length (ganze Zahl)" in said
