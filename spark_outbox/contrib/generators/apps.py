"""Django's app config. spark_outbox itself imports `sources`, as it does for every app."""

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class GeneratorsConfig(AppConfig):
    name = "spark_outbox.contrib.generators"
    label = "spark_outbox_generators"
    verbose_name = _("Generators")

    def ready(self) -> None:
        from spark_outbox.contrib.generators import checks

        checks.register_checks()
