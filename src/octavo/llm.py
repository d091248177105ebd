"""Offline use: ``LLM(model).generate(prompts, SamplingParams)``."""
