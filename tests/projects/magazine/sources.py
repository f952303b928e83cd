from collections.abc import Iterator
from typing import Any

from wagtail.models import Page, PageLogEntry

from spark_outbox import source
from tests.projects.magazine.models import Article


@source(Page)
def published(page: Page) -> Iterator[dict[str, Any]]:
    """On a parent: what is saved is an Article or a Feature."""
    if page.live_revision_id:
        key = f"published_{page.pk}_{page.live_revision_id}"
        yield {"group": "published", "key": key, "about": page}


@source(Article)
def revised(article: Article) -> Iterator[dict[str, Any]]:
    """On a child, which is the parent of another."""
    if article.latest_revision_id:
        key = f"revised_{article.pk}_{article.latest_revision_id}"
        yield {"group": "revised", "key": key, "about": article}


@source(PageLogEntry)
def logged(entry: PageLogEntry) -> Iterator[dict[str, Any]]:
    yield {"group": entry.action, "key": f"logged_{entry.pk}", "about": entry}
