"""Tables, functions, plans and privileges."""
