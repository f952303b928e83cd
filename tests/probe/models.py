"""Models that payloads may refer to, and some that they had better not. They have no migrations."""

from django.db import models


class Named(models.Model):
    """Has a key that is text."""

    name = models.CharField(max_length=50, primary_key=True)

    def __str__(self) -> str:
        return self.name


class Nicknamed(Named):
    class Meta:
        proxy = True


class Nameless(models.Model):
    class Meta:
        abstract = True


class Nowhere(models.Model):
    """Has no table."""

    class Meta:
        managed = False
