"""Start an engine on an export that has passed `verify`, ask the engine one question, and end it.

This package must not know individual engines. All facts about an engine stand in its row of ENGINES.
"""
