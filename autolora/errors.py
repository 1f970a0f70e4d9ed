"""Errors that AutoLoRA raises for wrong input.

Each message is one clear sentence: what is wrong, where, and what to do. The shell prints that
sentence alone and exits with status 2, so a message must be able to stand without a traceback.
"""

import unicodedata


class Message(str):
    """A sentence, or part of one, with the template and the values that it is made of.

    Faces translate the template; nobody has to find the values in the sentence again.

    Attributes:
        template: The sentence with ``{}`` for each value.
        values: The values; some may be messages themselves.
    """

    template: str
    values: tuple[object, ...]

    def __new__(cls, template: str, *values: object) -> "Message":
        """Make the sentence; a template without values is taken as it is."""
        if isinstance(template, Message) and not values:
            return template
        message = super().__new__(cls, template.format(*values) if values else template)
        message.template, message.values = template, values
        return message

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Copy and pickle by template and values."""
        return Message, (self.template, *self.values)

    def sentence(self) -> "Message":
        """Return it with a capital letter and a full stop."""
        return Message(f"{self.template[0].upper()}{self.template[1:]}.", *self.values)

    def to_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        values = [v.to_dict() if isinstance(v, Message) else str(v) for v in self.values]
        return {"template": self.template, "values": values}


class AutoLoRAError(Exception):
    """Base of all errors that a user's input can cause.

    Attributes:
        what: What is wrong.
        advice: What to do, where that is not said in `what`.
        message: Both, as the sentence that ``str`` gives.
        where: Field of a request or configuration that is wrong, such as ``loras[1].steps``; empty
            where that is not one field.
    """

    def __init__(self, what: str = "", *values: object, where: str = "", advice: str = "") -> None:
        """Make the error's sentence: ``what``, or ``what; advice``.

        Args:
            what: The sentence, or its template.
            *values: Values for the template.
            where: The field that is wrong.
            advice: What to do; may be a message.
        """
        self.what, self.advice, self.where = Message(what, *values), Message(advice), where
        self.message = self.what
        if advice:
            self.message = Message(f"{self.what.template}; {{}}", *self.what.values, self.advice)
        super().__init__(self.message)

    def to_dict(self) -> dict[str, object]:
        """Return plain data for JSON: the sentence, its field, its template and values."""
        return {"error": str(self), "where": self.where, **self.message.to_dict()}


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
