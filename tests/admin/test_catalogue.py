"""The German catalogue."""

import re

import pytest
from django.utils.translation import override

from spark_outbox import emit
from spark_outbox.models import OutboxEvent
from tests.admin.pages import EVENTS, words
from tests.postgres import ROOT

CATALOGUE = ROOT / "spark_outbox" / "locale" / "de" / "LC_MESSAGES" / "django.po"


def test_all_of_it_is_translated():
    text = CATALOGUE.read_text()
    assert "fuzzy" not in text
    entries = text.strip().split("\n\n")[1:]
    untranslated = [entry for entry in entries if re.search(r'^msgstr(\[\d\])? ""\n*(?!")', entry, re.M)]
    assert untranslated == []
    for entry in entries:  # what a translation leaves out would be missed, and what it adds would fail
        names = [
            sorted(set(re.findall(r"%\(\w+\)[sd]", line))) for line in entry.splitlines() if '"' in line
        ]
        assert all(found == names[0] for found in names), entry


@pytest.mark.django_db
def test_pages_are_in_the_language_of_the_browser(admin, own_registry):
    emit("g", "key")
    event = OutboxEvent.objects.get()

    def page(path):
        return words(admin.get(f"{EVENTS}{path}", headers={"accept-language": "de"}).text)

    with override(None):  # what a request activates stays
        assert "Das sind alle." in page("")
        assert "Gruppe g Zustand Ausstehend Versuche 0" in page(f"{event.id}/change/")
        assert "1 Ereignis wird aufgegeben." in page(f"discard/?ids={event.id}")
