from django.db import migrations

from spark_outbox.operations import ImportDjangoSpark


class Migration(migrations.Migration):
    atomic = False
    dependencies = [("spark_outbox", "0001_initial")]
    operations = [ImportDjangoSpark()]
