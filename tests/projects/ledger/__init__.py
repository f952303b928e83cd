"""An app of all three projects: handlers that mail and post, and a table of the mails."""
