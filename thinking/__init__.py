"""How long the add-on thinks about a prompt at inference: its segments, and when an example stops."""
