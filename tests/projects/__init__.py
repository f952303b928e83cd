"""Projects made with Wagtail, Oscar and django-ninja, driven through their own views."""
