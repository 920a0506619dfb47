"""Starts an engine on an export, asks it a question, and always ends it. What engines take is in config/engines.py."""
