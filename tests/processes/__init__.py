"""Real processes, signals, hosts and networks."""
