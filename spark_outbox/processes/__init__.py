"""Worker processes and their supervisor. Nothing here uses the database."""
