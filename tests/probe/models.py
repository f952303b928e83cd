"""Models that payloads may refer to, and some that they had better not. They have no migrations."""

from threading import Lock
from typing import Any

from django.db import models


class Named(models.Model):
    """Has a key that is text."""

    name = models.CharField(max_length=50, primary_key=True)

    def __str__(self) -> str:
        return self.name


class Badge(models.Model):
    holder = models.ForeignKey(Named, models.CASCADE)

    def __str__(self) -> str:
        return f"{self.pk}"


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


class Basket(models.Model):
    """Has values that can be changed in place."""

    total = models.IntegerField(default=0)
    notes = models.JSONField(default=dict)

    def __str__(self) -> str:
        return f"{self.total}"


class Line(models.Model):
    """Has a key of two columns, one of them a foreign key."""

    pk = models.CompositePrimaryKey("basket_id", "number")
    basket = models.ForeignKey(Basket, models.CASCADE)
    number = models.IntegerField()

    def __str__(self) -> str:
        return f"{self.pk}"


class Page(models.Model):
    """Has a key for which forms have rules that rows need not obey."""

    slug = models.SlugField(primary_key=True, max_length=4, choices=[("home", "Home")])

    def __str__(self) -> str:
        return self.slug


class Unwieldy(models.Model):
    """Its instances hold what can't be copied."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lock = Lock()

    def __str__(self) -> str:
        return f"{self.pk}"


class Tracked(models.Model):
    number = models.IntegerField(default=0)

    class Meta:
        abstract = True


class Parcel(Tracked):
    def __str__(self) -> str:
        return f"{self.pk}"


class Letter(Parcel):
    class Meta:
        proxy = True


class Express(Parcel):
    by = models.TimeField(null=True)


class Crate(Parcel):
    """Has a key that is not its parent's."""

    code = models.BigAutoField(primary_key=True)
    parcel = models.OneToOneField(Parcel, models.CASCADE, parent_link=True)


class Pallet(Tracked):
    def __str__(self) -> str:
        return f"{self.pk}"
