"""The preview in a real browser: the HTML of a mail is shown in a frame in which nothing runs."""

from spark_outbox import emit
from spark_outbox.contrib.mails.models import Mail
from tests.dashboard.test_browser import chromium, open_page, pytestmark

__all__ = ["chromium", "open_page", "pytestmark"]

EVIL = """<p id="shown">{{ name }}</p><img src="http://192.0.2.1/pixel.png">
<script>document.getElementById("shown").textContent = "run"</script>
<meta http-equiv="refresh" content="0; url=/admin/">
<form action="/admin/logout/" method="post"><button>go</button></form>"""


def test_the_preview_opens_beside_the_form_and_runs_nothing(open_page):
    mail = Mail.objects.create(event_group="paid", subject="Thanks", body="saved")
    emit("paid", name="Anna")
    page = open_page()
    page.goto(f"/admin/spark_outbox_mails/mail/{mail.pk}/change/")
    page.get_by_label("HTML").fill(EVIL)
    with page.context.expect_page() as opened:
        page.get_by_role("button", name="Preview").click()
    seen = opened.value
    frame = seen.frame_locator("iframe")
    assert frame.locator("#shown").text_content() == "Anna"
    assert page.url.endswith("/change/")
    assert not Mail.objects.filter(html=EVIL).exists()
    page.get_by_label("Subject").fill("Thank you")
    page.get_by_label("Subject").press("Enter")  # which saves, and does not preview
    page.wait_for_url("**/mail/")
    assert Mail.objects.get().html.splitlines() == EVIL.splitlines()
