"""OpenAI's Responses API: items in, items out, with a bounded memory of earlier responses."""
