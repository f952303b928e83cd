"""Buys in the shop: `python -m tests.projects.shop.drive NAME CHECKOUTS`."""

import sys
from decimal import Decimal

import django

django.setup()

from django.contrib.auth.models import User  # noqa: E402
from django.urls import reverse  # noqa: E402
from oscar.apps.address.models import Country  # noqa: E402
from oscar.apps.catalogue.models import Product  # noqa: E402
from oscar.test.factories import create_product  # noqa: E402

from tests.projects.client import Driver  # noqa: E402
from tests.projects.shop.sources import SPOILT  # noqa: E402

ADDRESS = {
    "first_name": "Anna",
    "last_name": "Smith",
    "line1": "1 Long Street",
    "line4": "London",
    "postcode": "W1A 1AA",
}
PLACE = {"action": "place_order"}
BACKEND = "django.contrib.auth.backends.ModelBackend"


def prepare() -> None:
    Country.objects.create(iso_3166_1_a2="GB", name="United Kingdom", is_shipping_country=True)
    for title in ("Pear", "Plum", SPOILT):
        create_product(title=title, price=Decimal("9.99"), num_in_stock=10**6, partner_name="Orchard")


def check_out(driver: Driver, name: str, number: int) -> None:
    """Walk through the checkout: each third as a customer, the others as guests.

    Of seven checkouts one is rolled back and given up, one is rolled back and tried again, and one is
    rolled back by Oscar itself to a savepoint.
    """
    driver.client.cookies.clear()
    doomed, again, spoilt = number % 7 == 0, number % 7 == 2, number % 7 == 4
    titles = ["Pear", *(["Plum"] if number % 2 else []), *([SPOILT] if spoilt else [])]
    for product in Product.objects.filter(title__in=titles):
        driver.insist(reverse("basket:add", args=[product.pk]), {"quantity": 1})
    if number % 3 == 0:
        email = f"{name}-{number}@example.com"
        driver.client.force_login(User.objects.create_user(email, email), BACKEND)
    else:
        guest = {"username": f"{name}@example.com", "options": "anonymous"}
        driver.insist(reverse("checkout:index"), guest)
    driver.insist(reverse("checkout:shipping-address"), ADDRESS)
    driver.get(reverse("checkout:shipping-method"))
    place = reverse("checkout:preview")
    driver.get(place)
    if doomed or again:
        assert not driver.post(place, PLACE, doomed=True)
        driver.counts["rolled back"] += 1
    if spoilt:
        response = driver.client.post(place, PLACE)
        assert "A problem occurred while placing this order" in response.text
        driver.counts["rolled back to a savepoint"] += 1
    elif not doomed:
        driver.insist(place, PLACE)
        driver.get(reverse("checkout:thank-you"))  # which saves the order again
        driver.counts["ordered"] += 1
        driver.counts["sold"] += len(titles)


if __name__ == "__main__":
    driver, name = Driver(), sys.argv[1]
    for number in range(int(sys.argv[2])):
        check_out(driver, name, number)
    driver.print_counts()
