from django.urls import path

from spark_outbox.observing import views

urlpatterns = [path("metrics/", views.metrics)]
