from django.db import models
from wagtail.models import Page


class Article(Page):
    """Has a table beside that of Page."""

    body = models.TextField()
    content_panels = [*Page.content_panels, "body"]


class Feature(Article):
    """Has a third one."""

    teaser = models.TextField()
    content_panels = [*Article.content_panels, "teaser"]
