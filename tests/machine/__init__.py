"""The units of deploy/systemd, on a machine of their own: a container in which a real systemd boots."""
