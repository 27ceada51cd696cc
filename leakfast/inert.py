"""Text that others wrote, on its way to a reader: what steers a terminal or a page instead of being read is written out.
Demands strings; leaves escaping for HTML, Markdown and JSON to whoever writes them."""

from __future__ import annotations

import re

# C0 and C1 controls except tab and newline, marks that turn or hide text, fillers that draw nothing, lone surrogates
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def inert(text: str) -> str:
    """`text` with every control character replaced by its visible escape, so that showing a completion cannot move the
    cursor, colour the screen, set the title or reverse the line."""
    return STEERING.sub(_escape, text)


def one_line(text: str) -> str:
    """The same for what is to stay on its line, such as a name: tabs and line breaks are escaped too."""
    return inert(text).replace("\t", "\\t").replace("\n", "\\n")


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
