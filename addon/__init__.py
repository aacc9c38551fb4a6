"""Optional parts of the add-on: other adapters, cached hidden states, curriculum, halting alarm, matched sizes."""
