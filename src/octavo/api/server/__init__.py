"""The HTTP server: routes, authentication, limits, errors, metrics and the event streams, for every dialect."""
