"""How the front half reaches an engine: in this process, over a socket, or a fake one for tests."""
