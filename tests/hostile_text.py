"""A text that does harm wherever it is shown as it is, and what must not be left of it."""

import unicodedata

# A title for the terminal, a cleared screen, a line written over, another direction, other lines, the end of a string
# and C1's own escape; then markup that is live in HTML and Markdown, which also ends code and cells.
HOSTILE = (
    "\x1b]0;title\x07\x1b[2J\rover\b\b\u202eturned\u2066\u2028next\u2029\x85\x00\x9b31m</script><b onclick=x>"
    "![x](http://x)[y](http://y) http://z ```|`` | `\\"
)
LINE = HOSTILE.replace("\x00", "").translate(dict.fromkeys(range(0x20)))  # what is left where C0 is refused
_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def harms_in(text: str) -> list[str]:
    """Return the characters of ``text`` that a terminal, a pager or an editor obeys."""
    controls = {"Cc", "Cs", "Zl", "Zp"}
    return sorted({c for c in text if (unicodedata.category(c) in controls and c not in "\n\t") or c in _BIDI})
