"""An app whose handlers do what their event says, and settings that export what they do into files."""
