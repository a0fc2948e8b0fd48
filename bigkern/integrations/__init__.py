"""Ways into other libraries: one module each, named after the library, imported by nobody but its user."""
