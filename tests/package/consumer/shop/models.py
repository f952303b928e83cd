from __future__ import annotations

from django.db import models


class Numbered(models.Model):
    number: models.IntegerField[int, int] = models.IntegerField()

    class Meta:
        abstract = True


class Order(Numbered):
    email: models.EmailField[str, str] = models.EmailField()


class Invoice(Numbered):
    pass
