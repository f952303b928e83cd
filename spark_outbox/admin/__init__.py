"""The outbox in the Django admin."""

import spark_outbox.dashboard.admin  # noqa: F401, which registers itself
