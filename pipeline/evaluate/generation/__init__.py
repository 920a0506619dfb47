"""Generate transcripts from prompts, with a model in this process or with a server that has OpenAI's API."""
