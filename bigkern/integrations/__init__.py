"""Ways in through other people's interfaces: one module each, imported by nobody but its user."""
