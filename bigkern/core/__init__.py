"""What all ops share, and nothing of any one op."""
