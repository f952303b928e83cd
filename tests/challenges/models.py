"""django-spark's example: challenges that collect donations. Plus a ledger of what was handled."""

from typing import TYPE_CHECKING

from django.conf import settings
from django.db import models
from django.db.models.expressions import RawSQL

if TYPE_CHECKING:
    from django.db.models.fields.related_descriptors import RelatedManager


class Challenge(models.Model):
    title = models.CharField(max_length=100)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, null=True, blank=True)
    is_active = models.BooleanField(default=True)
    start_date = models.DateField()
    end_date = models.DateField()

    donations: "RelatedManager[Donation]"

    def __str__(self) -> str:
        return self.title


class Donation(models.Model):
    challenge = models.ForeignKey(Challenge, models.CASCADE, related_name="donations")
    amount = models.DecimalField(max_digits=10, decimal_places=2)

    def __str__(self) -> str:
        return f"{self.amount} for {self.challenge_id}"


class Handled(models.Model):
    """One row each time a handler was called. No constraint: handling twice must show."""

    key = models.CharField(max_length=255, db_index=True)
    handler = models.CharField(max_length=255)
    note = models.TextField(default="", blank=True)
    handled_at = models.DateTimeField(db_default=RawSQL("clock_timestamp()", ()))

    class Meta:
        verbose_name_plural = "handled"

    def __str__(self) -> str:
        return f"{self.key} by {self.handler}"
