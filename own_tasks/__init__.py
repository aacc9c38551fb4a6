"""Tasks made of the user's own data: files, folders and data sets of the hub, with a verifier of the user's choice."""
