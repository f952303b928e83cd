"""Settings of a project whose second database is SQLite, in the file that LITE names."""

import os

from tests.settings import *  # noqa: F403

INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "spark_outbox"]
ROOT_URLCONF = ""  # no admin
DATABASES["lite"] = {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["LITE"]}  # noqa: F405
