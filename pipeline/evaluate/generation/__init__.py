"""Prompts in, transcripts out: from a model that is loaded here, or from a server with OpenAI's API."""
