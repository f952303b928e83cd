"""An admin that has deliveries, and no events."""

from django.contrib.admin import AdminSite
from django.urls import path

from spark_outbox.admin.deliveries import DeliveryAdmin
from spark_outbox.models import Delivery

site = AdminSite(name="alone")
site.register(Delivery, DeliveryAdmin)

urlpatterns = [path("admin/", site.urls)]
