"""A magazine made with Wagtail: articles and features, edited in Wagtail's admin."""
