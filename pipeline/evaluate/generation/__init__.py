"""Prompts in, transcripts out: by a model that is loaded here, or by any server with OpenAI's chat API."""
