"""The one parser of the policy's tags. The environment acts on its result and the scorer scores the same object.

A turn is read once, from left to right. What it means is decided by the first complete action outside thinking, so
no text after that can change it: a completion that stops at the closing tag and one that runs on mean the same.

- Tags are exactly `<think> </think> <search> </search> <answer> </answer> <information> </information>`: lower
  case, no spaces, no attributes. Anything else is plain text.
- Text before, between and after is free; a turn need not think. Every turn starts outside thinking.
- `<think>` opens thinking, the next `</think>` closes it (thinking does not nest). Tags inside it mean nothing. A
  thinking block that is never closed reaches to the end of the turn, which then holds no action. The engine's stop
  strings also fire inside thinking; such a turn ends there and is invalid, and the policy is told so.
- An action is `<search>` or `<answer>`, text without any tag, and the closing tag of the same kind. One whose text
  holds a tag (nested, repeated, crossed) is void: reading goes on after its closing tag. One that is never closed
  reaches to the end of the turn, which then holds no action.
- A closing tag without its opening tag, and `<information>` outside an action, are ignored.
- An empty query decides the turn too: Invalid("empty_query"). An empty answer is an answer (and scores 0).
"""

from __future__ import annotations

from zs_fast.host import first_action
from zs_fast.types import Action, Answer, Invalid, Search


def parse_turn(text: str) -> Action:
    """What one completion means. Total, and linear in the length of the text."""
    found = first_action(text)
    if found is None:
        return Invalid("no_action")
    kind, start, end = found
    content = text[start:end].strip()
    if kind == "answer":
        return Answer(content)
    return Search(content) if content else Invalid("empty_query")
