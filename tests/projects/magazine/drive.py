"""Edits pages in Wagtail's admin: `python -m tests.projects.magazine.drive NAME ACTIONS`."""

import random
import sys

import django

django.setup()

from django.contrib.auth.models import User  # noqa: E402
from django.urls import reverse  # noqa: E402
from wagtail.models import Page  # noqa: E402

from tests.projects.client import NAMES, Driver  # noqa: E402

WEIGHTS = {"publish": 60, "edit": 15, "unpublish": 10, "move": 8, "delete": 7}
FEWEST = 5
"""Pages of a folder; of fewer none is deleted."""
EVERY = 7
"""Of so many actions one is rolled back."""


def prepare() -> None:
    """Create two folders for each editor."""
    home = Page.objects.get(depth=2)
    for name in NAMES:
        for title in (f"{name} one", f"{name} two"):
            home.add_child(instance=Page(title=title))


class Editor:
    """Works on the pages of two folders of their own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.driver = Driver()
        self.random = random.Random(name)
        self.driver.client.force_login(User.objects.create_superuser(name))
        self.folders = list(Page.objects.filter(title__startswith=f"{name} "))

    def act(self, number: int) -> None:
        doomed = number % EVERY == 0
        folder, other = self.random.sample(self.folders, 2)
        pages = list(Page.objects.child_of(folder))
        (action,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
        page = self.random.choice(pages) if len(pages) >= FEWEST else None
        if page is None:
            action = "create"
        elif action == "unpublish" and not page.live:
            action = "publish"
        data = None
        match action:
            case "create":
                kind = ("article", "feature")[number % 2]
                view, args = "add", ("magazine", kind, folder.pk)
                data = self.form(f"{self.name}-{number}")
            case "edit" | "publish":
                view, args = "edit", (page.pk,)
                data = self.form(page.slug) | ({"action-publish": "1"} if action == "publish" else {})
            case "move":
                view, args = "move_confirm", (page.pk, other.pk)
            case _:
                view, args = action, (page.pk,)
        path = reverse(f"wagtailadmin_pages:{view}", args=args)
        saved = self.driver.post(path, data, doomed=doomed)
        self.driver.counts[action if saved else "rolled back"] += 1

    def form(self, slug: str) -> dict[str, str]:
        title = f"{slug}, {self.random.randrange(10**6)}"
        return {"title": title, "slug": slug, "body": title, "teaser": title}


if __name__ == "__main__":
    editor = Editor(sys.argv[1])
    for number in range(int(sys.argv[2])):
        editor.act(number)
    editor.driver.print_counts()
