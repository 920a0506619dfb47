"""Prompts in, transcripts out: from a model loaded here, or from any server with OpenAI's API.

This package must not know how answers are scored.
"""
