"""The Ollama dialect: ``/api/chat`` and its sisters; it maps fields and holds no logic of its own."""
