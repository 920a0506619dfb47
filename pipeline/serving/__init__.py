"""Engines that serve an export: what each takes, how it is started, and that it is always ended again."""
