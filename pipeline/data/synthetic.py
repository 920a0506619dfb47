"""Generates conversations, so that users can try the program without the internet."""

from importlib.resources import files
from typing import Any

import torch

_ROWS = 4000


def arithmetic_rows() -> list[dict[str, Any]]:
    """Return rows with conversations about sums. Every call returns the same rows.

    Each answer has one line of reasoning. Every fifth conversation has a second turn.
    """
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 50, (_ROWS, 3), generator=generator).tolist()
    return [_conversation(i, *numbers[i]) for i in range(_ROWS)]


def chat_template() -> str:
    """Return the chat template of gpt-oss, read from the TRL package."""
    return (files("trl") / "chat_templates" / "gptoss.jinja").read_text(encoding="utf-8")


def _conversation(index: int, a: int, b: int, c: int) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"What is {a} + {b}?"},
        {"role": "assistant", "thinking": f"{a} + {b} = {a + b}", "content": f"{a + b}"},
    ]
    if index % 5 == 0:
        messages += [
            {"role": "user", "content": f"And {c} more?"},
            {"role": "assistant", "thinking": f"{a + b} + {c} = {a + b + c}", "content": f"{a + b + c}"},
        ]
    return {"messages": messages}


def tokenizer_corpus() -> list[str]:
    """Return the texts for training a small tokenizer: the fixed text of the chat template, and some rows."""
    fixed = (
        "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
        "Current date: 2025-08-05\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final."
        " Channel must be included for every message. assistant user system developer # Instructions"
    )
    rows = [text for row in arithmetic_rows()[:500] for m in row["messages"] for text in m.values()]
    return [fixed] * 200 + rows
