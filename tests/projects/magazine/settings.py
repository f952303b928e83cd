from tests.projects.settings import *  # noqa: F403

INSTALLED_APPS = [
    "spark_outbox",
    "tests.projects.ledger",
    "tests.projects.magazine",
    "wagtail.users",
    "wagtail.images",
    "wagtail.documents",
    "wagtail.snippets",
    "wagtail.embeds",
    "wagtail.sites",
    "wagtail.search",
    "wagtail.admin",
    "wagtail",
    "modelcluster",
    "taggit",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
]
ROOT_URLCONF = "tests.projects.magazine.urls"
WAGTAIL_SITE_NAME = "Magazine"
WAGTAILADMIN_BASE_URL = "http://testserver"
WAGTAILADMIN_COMMENTS_ENABLED = False
