"""Descriptions of values in the messages of errors."""

from __future__ import annotations

__all__ = ["shown", "with_article"]

_LONGEST_REPR = 120  # characters


def shown(value: object) -> str:
    """Returns a short description of a value for a message: its repr, or its class.

    Example:
        >>> shown("5%"), shown(list(range(100))), shown(int)
        ("'5%'", 'a list', 'the class int')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # any error of the object, a list that is too deep
        text = ""
    is_short = 0 < len(text) <= _LONGEST_REPR and "\n" not in text and " at 0x" not in text
    return text if is_short else with_article(type(value).__name__)


def with_article(name: str) -> str:
    """Returns a noun with its indefinite article.

    Example:
        >>> with_article("int"), with_article("SGD"), with_article("dict")
        ('an int', 'an SGD', 'a dict')
    """
    begins_with_vowel = name[0].lower() in "aeiou" or (name[:2].isupper() and name[0] in "FHLMNRSX")
    return f"{'an' if begins_with_vowel else 'a'} {name}"
