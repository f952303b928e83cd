import oscar
from oscar.defaults import *  # noqa: F403

from tests.projects.settings import *  # noqa: F403

INSTALLED_APPS = [
    "spark_outbox",
    "tests.projects.ledger",
    "tests.projects.shop",
    *oscar.INSTALLED_APPS,
    "sorl.thumbnail",
]
SITE_ID = 1
MIDDLEWARE += ["oscar.apps.basket.middleware.BasketMiddleware"]  # noqa: F405
TEMPLATES[0]["OPTIONS"]["context_processors"] += [  # noqa: F405
    "oscar.apps.search.context_processors.search_form",
    "oscar.apps.checkout.context_processors.checkout",
    "oscar.apps.communication.notifications.context_processors.notifications",
    "oscar.core.context_processors.metadata",
]
AUTHENTICATION_BACKENDS = [
    "oscar.apps.customer.auth_backends.EmailBackend",
    "django.contrib.auth.backends.ModelBackend",
]
ROOT_URLCONF = "tests.projects.shop.urls"
HAYSTACK_CONNECTIONS = {"default": {"ENGINE": "haystack.backends.simple_backend.SimpleEngine"}}
EMAIL_BACKEND = "django.core.mail.backends.dummy.EmailBackend"
OSCAR_ALLOW_ANON_CHECKOUT = True
THUMBNAIL_DUMMY = True  # its products have no pictures
