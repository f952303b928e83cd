"""Worker processes and who looks after them. Nothing here asks the database."""
