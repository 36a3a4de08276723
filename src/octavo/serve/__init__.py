"""Serving: a thread that runs the engine for everybody, its metrics, and an OpenAI-compatible API around it."""
