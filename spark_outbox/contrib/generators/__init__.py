"""Generators: events that people define in the admin, from sources that the project registers.

definitions  the registered sources: candidates, and what is known of each
conditions   the types of variables, and comparing them
models       generators and their conditions
rules        a generator as it is evaluated
sources      the sweep over active generators
preview      what a generator would emit now
admin        the pages
checks       the system check
"""

from spark_outbox.contrib.generators.definitions import Variable, register_source

__all__ = ["Variable", "register_source"]
