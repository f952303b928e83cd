from django.db import models


class Mail(models.Model):
    """A mail that was sent for an event. Its key is not unique: doubles are to be found."""

    key = models.CharField(max_length=255)
    subject = models.TextField()

    def __str__(self) -> str:
        return self.subject
