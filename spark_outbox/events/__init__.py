"""The event: its fields, its payload as JSON, and the model instances that it refers to."""
