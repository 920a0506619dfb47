"""Start an engine on a proven export, ask it one question, and end it.

This package must not know individual engines. All facts about an engine stand in its row of ENGINES.
"""
