"""Payloads as HTML."""

from spark_outbox.admin import documents
from spark_outbox.events.encoding import TAG


def test_a_bounded_number_of_references_is_looked_up(monkeypatch):
    monkeypatch.setattr(documents, "SHOWN", 10**9)
    asked = []

    def find(*reference):
        asked.append(reference)
        return "/here/" if len(asked) % 2 else ""

    payload = [{TAG: ["model", "shop.order", number, "default"]} for number in range(3000)]
    html, is_cut = documents.as_html(payload, find)
    assert not is_cut
    assert asked == [("shop.order", str(number), "default") for number in range(documents.LINKED)]
    assert html.count('href="/here/"') == documents.LINKED // 2
    assert html.count("shop.order") == 3000
