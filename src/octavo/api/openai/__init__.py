"""The OpenAI dialect: it maps fields and holds no engine logic."""
