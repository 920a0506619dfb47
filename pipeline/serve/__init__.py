"""An engine on a proven export: its command, its process, and one question to it.

It must not know how an engine works: all that it needs stands in the engine's row in ENGINES.
"""
