"""Rewrite the generated part of docs/config.md: `python docs/generate.py`."""

from pathlib import Path

from nmoe.config import Config
from nmoe.toml import reference

PAGE = Path(__file__).parent / "config.md"
MARK = "<!-- From here on generated from nmoe/schema.py by docs/generate.py. -->\n\n"


def page() -> str:
    """docs/config.md as it should be: the text above the mark as written, the reference below it."""
    return PAGE.read_text().partition(MARK)[0] + MARK + reference(Config) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
