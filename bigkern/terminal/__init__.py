"""What commands share: printing for people or in JSON, files that are whole or absent, options."""
