"""Operating kvbelt: starting a whole deployment, showing it off, watching a request."""
