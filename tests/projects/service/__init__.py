"""A service made with django-ninja: async views on uvicorn, which emit with aemit."""
