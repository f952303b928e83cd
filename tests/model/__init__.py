"""The model of the wake protocol, held against the code."""
