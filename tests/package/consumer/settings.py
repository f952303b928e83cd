SECRET_KEY = "not a secret"
INSTALLED_APPS = ["spark_outbox", "shop"]
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql"}}
