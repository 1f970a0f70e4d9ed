"""Errors that AutoLoRA raises for wrong input.

Each message is one clear sentence: what is wrong, where, and what to do. The shell prints that
sentence alone and exits with status 2, so a message must be able to stand without a traceback.
"""

import unicodedata


class AutoLoRAError(Exception):
    """Base of all errors that a user's input can cause.

    Attributes:
        where: Field of a request or configuration that is wrong, such as ``loras[1].steps``; empty
            where that is not one field.
    """

    def __init__(self, sentence: str = "", *, where: str = "") -> None:
        """Hold the sentence and its field."""
        super().__init__(sentence)
        self.where = where


class LoRAFormatError(AutoLoRAError):
    """A file, or a set of factors, that is not a usable LoRA."""


class FamilyError(LoRAFormatError):
    """A LoRA file for another base model than those that are read, or for one of several.

    Attributes:
        title: What to call the base model; empty where several remain.
        candidates: Titles of the models that it may be for, where several remain.
        families: Names of those that can be asked for.
    """

    def __init__(
        self,
        message: str,
        title: str = "",
        candidates: tuple[str, ...] = (),
        families: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.title = title
        self.candidates = candidates
        self.families = families


class PoolError(AutoLoRAError):
    """A pool folder that is missing or empty, or a name that is not in it."""


class ConfigError(AutoLoRAError):
    """A configuration file or option with a wrong key or value."""


class FusionError(AutoLoRAError):
    """Adapters that cannot be attached to, or fused in, this model."""


class RetrievalError(AutoLoRAError):
    """An index or encoder that is missing, stale, or does not fit the pool."""


class GenerationError(AutoLoRAError):
    """A request that no picture can be generated for."""


def shown(text: object, limit: int = 160) -> str:
    """Make a file name or key safe to put in a one-line message.

    Args:
        text: Anything whose ``str`` may come from a user's file.
        limit: Longest result in characters; the middle of a longer text is cut out.

    Returns:
        The text with line breaks and other unprintable characters escaped.
    """
    escaped = "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in str(text)
    )
    if len(escaped) <= limit:
        return escaped
    half = (limit - 3) // 2
    return f"{escaped[:half]}...{escaped[-half:]}"


_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(line: str) -> str:
    """Drop what a terminal would obey or no UTF-8 file can hold.

    Args:
        line: Text without line breaks.

    Returns:
        The text without control characters, lone surrogates and marks that override the writing
        direction; tabs become blanks.
    """
    if line.isprintable():
        return line
    return "".join(
        char
        for char in line.replace("\t", " ")
        if unicodedata.category(char) not in ("Cc", "Cs") and char not in _DIRECTIONS
    )
