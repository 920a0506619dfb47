"""Start an engine on a proven export, ask it one question, and end it.

This package must not know single engines. All facts about an engine stand in its row in ENGINES.
"""
