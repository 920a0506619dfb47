"""A chat template that takes too much time or memory ends in a message. Each of them ends a process."""

from typing import Any

import pytest

from pipeline.data import template_text
from pipeline.data.conversations import ConversationError
from pipeline.data.harmony import Rendering, examples
from pipeline.data.parsing import parse_conversation
from pipeline.errors import UserError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
BIG = "{% set n = (messages|length + 6) ** (10**6) %}"
DEEP = (
    "{% set x = namespace(a=[1], b=[1]) %}"
    "{% for i in range(60) %}{% set x.a = [x.a, x.a] %}{% set x.b = [x.b, x.b] %}{% endfor %}"
)
"""Lists that are small in memory, and that have 2**60 elements for those who compare or print them."""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 10**(10**9) }}", "longer than 0.1 seconds"),  # jinja2 computes constants when it compiles
        ("{% set n = messages|length + 9 %}{{ n**(n**9) }}", "longer than 0.1 seconds"),
        ("{{ 0 if 3**(3**16) // 7**(7**8) else 1 }}", "longer than 0.1 seconds"),
        (BIG + "{% for i in range(9999) %}{% set m = (n * n) % (n + 1) %}{% endfor %}", "longer than 0.1 seconds"),
        (DEEP + "{{ x.a == x.b }}", "longer than 0.1 seconds"),
        (DEEP + "{{ x.a in [x.b] }}", "longer than 0.1 seconds"),
        ("{{ range(99999)|map('string')|map('urlize')|join|length }}" * 9, "longer than 0.1 seconds"),
        ("{{ ('a ' * 10**6)|wordwrap(2)|length }}" * 9, "longer than 0.1 seconds"),
        ("{{ (('x' * 10**7)|batch(1)|list|length) }}", "seconds|memory"),
        (DEEP + "{{ x.a }}", "seconds|memory"),
        (DEEP + "{{ x.a|tojson }}", "seconds|memory"),
        ("{{ 'x' * 10**10 }}", "GiB of memory"),
        ("{{ 'x'|center(10**10) }}", "GiB of memory"),
        ("{{ ('x\n' * 10**6)|indent(10**6) }}", "seconds|memory"),
        ("{{ '%*d' % (10**9, 1) }}{{ '%2000000000d' % 1 }}", "GiB of memory"),
        ("{{ '%2000000000d'|format(1) }}", "GiB of memory"),
        ("{{ '{:2000000000}'.format(1) }}", "GiB of memory"),
        ("{{ 'x'.ljust(10**10) }}", "GiB of memory"),
        ("{{ ['x'] * 10**10 }}", "GiB of memory"),
        ("{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}", "GiB of memory"),
        ("{{ range(10**9)|list }}", "refuses it: Range too big"),
    ],
)
def test_a_template_that_takes_too_much_ends_in_a_message(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    monkeypatch.setattr(template_text, "MOST_SECONDS", 0.1 if "seconds" in message else 2.0)
    monkeypatch.setattr(template_text, "MOST_MEMORY", 1 << 27)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rendering = Rendering(tokenizer, "medium", "2025-08-05", every_turn=True, form="template")
    with pytest.raises((UserError, ConversationError), match=message):
        examples(parse_conversation({"messages": MESSAGES}), rendering)
