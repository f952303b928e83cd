"""The demo project: django-spark's challenges, on DATABASE_URL or an embedded PostgreSQL."""

import os

from tests import postgres

SERVER = (
    postgres.Server(os.environ["DATABASE_URL"], "DATABASE_URL")
    if os.environ.get("DATABASE_URL")
    else postgres.embedded("demo", keep=True)
)
DATABASES = {"default": postgres.django_database(SERVER.url)}

BASE_DIR = postgres.ROOT
SECRET_KEY = "not a secret: this project runs on your machine alone"
DEBUG = os.environ.get("DEBUG") == "1"
ALLOWED_HOSTS = ["*"] if DEBUG else ["localhost", "127.0.0.1", "[::1]"]
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "spark_outbox",
    "spark_outbox.contrib.mails",
    "tests.challenges",
    "spark_outbox.contrib.generators",  # here, so that its models are swept last
    *os.environ.get("EXTRA_APPS", "").split(),
]
USE_TZ = True
TIME_ZONE = "UTC"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
ROOT_URLCONF = "tests.urls"
STATIC_URL = "static/"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
