"""The Anthropic dialect: ``/v1/messages``; it maps fields and holds no logic of its own."""
