from tests.projects.settings import *  # noqa: F403

DATABASES["default"]["ATOMIC_REQUESTS"] = False  # noqa: F405, Django refuses it to async views
INSTALLED_APPS = [
    "spark_outbox",
    "tests.projects.ledger",
    "tests.projects.service",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "ninja",
]
MIDDLEWARE = []
ROOT_URLCONF = "tests.projects.service.urls"
