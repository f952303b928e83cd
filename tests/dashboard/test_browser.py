"""The dashboard in a real browser, a headless Chromium. Any error on its console fails a test."""

import os
import re
import shutil
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.test import Client

from spark_outbox.dashboard import admin as dashboard
from spark_outbox.models import OutboxEvent
from spark_outbox.store import triaging
from tests.dashboard.shop import filled
from tests.postgres import ROOT
from tests.tools import statuses

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]

PAGE = "/admin/spark_outbox/dashboard/"
SCREENSHOTS = ROOT / "deploy" / "screenshots"


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    # Its loop runs in this thread, in which Django then refuses queries; but nothing here is async.
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"
    try:
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            yield browser
            browser.close()
    finally:
        del os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"]


@pytest.fixture
def open_page(chromium, live_server):
    """A function that opens a page as somebody who may do everything. At the end nothing may have been
    refused or have failed."""
    client = Client()
    client.force_login(User.objects.create_superuser("demo", password="demo"))
    cookie = client.cookies["sessionid"].value
    contexts, errors = [], []

    def note(said):
        if said.type == "error" and not said.location["url"].endswith("/favicon.ico"):
            errors.append(said.text)

    def open_(path="", **options):
        context = chromium.new_context(base_url=live_server.url, **options)
        contexts.append(context)
        context.add_cookies([{"name": "sessionid", "value": cookie, "url": live_server.url}])
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(PAGE + path)
        return page

    open_.errors = errors
    yield open_
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def shop(own_registry):
    with filled(own_registry):
        yield


KIND = "?handler=shop.mail_invoice&fingerprint=smtplib.SMTPRecipientsRefused%3A+no+such+mailbox%3A+*"


def every_page(page):
    for path in ("", "triage/", f"triage/kind/{KIND}", f"triage/discard/{KIND}", "explain/?key=order_1"):
        page.goto(PAGE + path)
        yield path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible(open_page, shop, scheme):
    from axe_playwright_python.sync_playwright import Axe

    found = []
    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    for path in every_page(page):
        assert page.locator("h1").count() == 1
        for details in page.locator("#content details").all():
            details.locator("summary").click()
        results = Axe().run(page, context="#main")
        found += [
            (path, violation["id"], [node["html"] for node in violation["nodes"]][:3])
            for violation in results.response["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
    assert found == []


def test_pages_fit_on_a_phone(open_page, shop):
    page = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    for path in every_page(page):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path


def test_what_is_refused_is_noticed(open_page):
    """The test of the tests: the policy is in force."""
    page = open_page()
    assert open_page.errors == []
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=color:red>x</p>')")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=https://example.com/x.png>')")
    page.evaluate("document.body.setAttribute('onclick', 'alert(1)')")
    assert len([error for error in open_page.errors if "Content Security Policy" in error]) == 3
    open_page.errors.clear()


# Live


def test_a_new_failure_appears_by_itself_and_is_announced(open_page, fail, monkeypatch):
    monkeypatch.setattr(dashboard, "EVERY", 0.2)
    fail("old", error="OldError: no", number=30)
    page = open_page("triage/", viewport={"width": 800, "height": 300})
    link = page.get_by_role("link", name="OldError: no", exact=True)
    link.focus()
    page.evaluate("window.scrollTo(0, 60)")
    place = page.evaluate("window.scrollY")
    fail("new", error="NewError: no")
    page.get_by_role("link", name="NewError: no", exact=True).wait_for()
    assert page.locator("[role=status][data-said]").inner_text() == "2 kinds of failures."
    assert page.evaluate("document.activeElement.textContent") == "OldError: no"
    assert page.evaluate("window.scrollY") == place


def test_a_page_is_let_alone_while_somebody_is_busy_with_it(open_page, fail):
    page = open_page("triage/")
    page.clock.install()
    page.reload()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    state, button = page.locator("[data-state]"), page.get_by_role("button", name="Pause")

    def run_until(happened):
        """In small steps, for while the clock runs an answer seems to take that long."""
        for _ in range(1000):
            if happened():
                return
            page.clock.run_for(100)
        raise AssertionError

    def waits():
        run_until(lambda: state.inner_text() == "Paused")
        asked.clear()
        page.clock.run_for(60_000)
        return asked == []

    def goes_on():
        asked.clear()
        with page.expect_response(re.compile("/triage/fragment/")):
            run_until(lambda: asked)
        return True

    assert goes_on()
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert waits()
    button.click()
    assert goes_on()
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<input id=field aria-label=field>');"
        "document.getElementById('field').focus()"
    )
    assert waits()
    page.evaluate("document.activeElement.blur()")
    assert goes_on()
    page.evaluate("getSelection().selectAllChildren(document.querySelector('[data-live-url] p'))")
    assert waits()
    page.evaluate("getSelection().removeAllRanges()")
    assert goes_on()
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    assert waits()


def test_a_page_says_that_its_figures_are_old(open_page, live_server):
    page = open_page()
    page.route("**/fragment/", lambda route: route.fulfill(status=302, headers={"location": PAGE}))
    page.clock.install()
    page.reload()
    page.clock.run_for(6_000)
    page.get_by_text("No answer: these figures are old").wait_for()


# Repair


def test_a_kind_is_retried_by_keyboard_alone(open_page, fail, monkeypatch):
    monkeypatch.setattr(triaging, "NEXT", triaging.NEXT.replace("limit 1000", "limit 5"))
    monkeypatch.setattr(triaging, "PIECE", 5)
    fail(number=12)
    page = open_page("triage/")

    def tab_to(text):
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent").strip().startswith(text):
                return page.keyboard.press("Enter")
        raise AssertionError(text)

    tab_to("Retry")
    page.get_by_text("12 events get all their attempts again.").wait_for()
    tab_to("Retry them")
    page.get_by_text("That was all.").wait_for()
    page.get_by_text("12 events are retried.").wait_for()
    page.locator("[role=status]").get_by_text("Finished.").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Back to triage"
    assert set(statuses().values()) == {"pending"}
    page.keyboard.press("Enter")
    page.wait_for_url(f"**{PAGE}triage/")


def test_a_repair_can_be_stopped_and_go_on(open_page, fail, monkeypatch):
    monkeypatch.setattr(triaging, "NEXT", triaging.NEXT.replace("limit 1000", "limit 1"))
    monkeypatch.setattr(triaging, "PIECE", 1)
    fail(number=4)
    page = open_page("triage/discard/?handler=shop.mail&fingerprint=ValueError%3A+no")
    posts = []

    def hold(route):
        """Let the first step through, and press Stop before its answer comes."""
        if route.request.method == "POST":
            posts.append(route)
            if len(posts) == 1:
                page.locator("#spark-stop").evaluate("button => button.click()")
        route.continue_()

    page.route("**/triage/discard/**", hold)
    page.get_by_label("Why are they discarded?").fill("the club has closed")
    page.get_by_role("button", name="Discard them").click()
    page.get_by_text("Stopped.").wait_for()
    assert len(posts) == 1
    assert OutboxEvent.objects.filter(status="discarded").count() == 1
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("That was all.").wait_for()
    assert OutboxEvent.objects.filter(status="discarded").count() == 4


# Screenshots


def test_screenshots(open_page, shop, settings, request, tmp_path):
    """With --screenshots they are those of the documentation."""
    settings.SPARK_OUTBOX = {"ENVIRONMENT": "staging"}
    folder = SCREENSHOTS if request.config.getoption("screenshots") else tmp_path
    folder.mkdir(exist_ok=True)
    desk, phone = {"width": 1120, "height": 800}, {"width": 390, "height": 844}
    for name, path, options in (
        ("dashboard", "", {"viewport": desk, "color_scheme": "light"}),
        ("triage", "triage/", {"viewport": {**desk, "height": 660}, "color_scheme": "dark"}),
        ("phone", "triage/", {"viewport": phone, "color_scheme": "light", "is_mobile": True}),
    ):
        page = open_page(path, **options)
        page.evaluate("document.getElementById('toggle-nav-sidebar')?.click()")
        file = folder / f"{name}.png"
        page.screenshot(path=file, animations="disabled")
        assert file.stat().st_size < 100_000, name
    there = {path.name for path in Path(SCREENSHOTS).glob("*.png")}
    assert there == {"dashboard.png", "triage.png", "phone.png"}
