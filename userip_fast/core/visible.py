"""What comes from data, for a terminal: control characters are shown, not sent."""

from __future__ import annotations

import re

# Escapes, carriage returns, the 8-bit control characters, marks that turn the direction of writing,
# and halves of characters, which no terminal can be sent. Tabs and line ends are as they should be.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: object) -> str:
    r"""The text with what a terminal would act upon written as \u001b, which JSON reads too."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))
