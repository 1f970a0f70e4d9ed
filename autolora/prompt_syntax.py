r"""What people write into prompts besides words: LoRA tags, weights, choices, wildcards.

`parse_prompt` takes it out: the base models here read plain language. Tags are those of A1111 and
Forge (``<lora:name:0.8>``, ``<lyco:...>``, with the arguments of LoRA Block Weight and others),
SwarmUI (``<random:a,b>``, ``<wildcard:...>``) and ComfyUI (``embedding:name``); weights those of
A1111 (``(word:1.3)``, ``[word]``) and InvokeAI (``word++``); choices those of Dynamic Prompts
(``{red|blue}``, ``__file__``). Whatever is not used is said in a note. A backslash keeps a bracket
as it is; `escape` is the way back.

Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from autolora.errors import GenerationError, Message, shown
from autolora.infotext import Parameters, copied_parameters
from autolora.unit import LoRAUnit, unit_of_text

MAX_PROMPT = 10_000
"""Most characters of a prompt."""
LORA_TAGS = frozenset({"lora", "lyco", "locon", "loha", "lokr", "dora"})
_CHOICE_TAGS = frozenset({"random", "alternate", "alt", "fromto"})
_WILDCARD_TAGS = frozenset({"wildcard", "wc"})

_TAG = re.compile(r'<(?P<kind>[A-Za-z][\w-]*)(?:\[[^\]<>]*\])?:(?P<inside>"[^"<>]*"[^<>]*|[^<>]*)>')
_BARE_TAG = re.compile(r"<(?:break|trigger)>", re.IGNORECASE)
# A tag whose end was lost, up to its strength.
_OPEN_TAG = re.compile(
    r"<(?P<kind>lora|lyco):(?P<inside>[^<>:,\n]+:-?\d*\.?\d+)(?![\d.:])", re.IGNORECASE
)
_MAX_NESTED = 16
_TOKEN = re.compile(
    r"\\(?P<kept>BREAK\b|[\\()\[\]{}<>_|:+-])"
    r"|(?P<wildcard>(?<!\w)__(?=[^_\s])[\w\-./*~ ]{0,100}?[^_\s]__(?!\w))"
    r"|(?P<embedding>\bembedding:[\w./\\-]+(?::[\d.]+)?)"
    r"|(?P<break>\bBREAK\b)"
    r"|(?P<bracket>[()\[\]{}])"
    r"|(?P<bar>\|)"
)
_CLOSERS = {")": "(", "]": "[", "}": "{"}
_WEIGHT = re.compile(r"\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")
_AFTER_GROUP = re.compile(r"(?:[+]+|-+|\d*\.\d+)(?=[\s,.;)\]]|$)")
_MARKED_WORD = re.compile(r"(?<=[^\W\d_]{2})(?:\+{2,4}|-{2,4})(?=[\s,.;]|$)")
_SCHEDULE = re.compile(r"(?P<start>.*?):(?P<end>.*):\s*\d*\.?\d+\s*", re.DOTALL)
_FROM_STEP = re.compile(r"(?P<end>.*):\s*\d*\.?\d+\s*", re.DOTALL)
_COUNTED = re.compile(r"\s*(?P<count>\d{1,3})(?:-\d{0,3})?\$\$(?:[^$|]*\$\$)?")
_OPTION_WEIGHT = re.compile(r"\s*\d*\.?\d+::")
_SPACES = re.compile(r"\s+")
_TO_ESCAPE = re.compile(
    r"[\\()\[\]{}|<>]|__|\bBREAK\b|(?<=embedding):|(?<=Steps):|(?<=[^\W\d_]{2})(?:\+|-)(?=[+-])"
)


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt and what it asked for.

    Attributes:
        text: The words alone.
        loras: What the tags asked for, in order.
        notes: What was left out or read in another way, one sentence each.
        pasted: Generation parameters of another program that stood at its end; their prompt is
            what `text` and `loras` are taken from.
    """

    text: str
    loras: tuple[LoRAUnit, ...]
    notes: tuple[str, ...] = ()
    pasted: Parameters | None = None


def parse_prompt(prompt: str) -> ParsedPrompt:
    """Take everything but words out of a prompt.

    Args:
        prompt: Text, with any number of ``<lora:name>`` or ``<lora:name:strength>``. Where there
            are two strengths, as A1111 allows, the second is the transformer's.

    Returns:
        The text and the adapters; `escape` makes a prompt of the text again.

    Raises:
        GenerationError: The prompt is empty or far too long, or a tag is not understood.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise GenerationError("The prompt is empty; say what the picture shall show.")
    check_text(prompt, "The prompt")
    pasted = copied_parameters(prompt)
    notes = _Notes()
    if pasted is not None:
        some = ", ".join(f"{name}: {value}" for name, value in list(pasted.settings.items())[:3])
        notes.say(
            "The prompt ends with settings of another program "
            f"({shown(some, 80)}); they were taken out of it and are not used."
        )
    text, loras = _read(prompt if pasted is None else pasted.prompt, notes)
    return ParsedPrompt(_tidy(text), tuple(loras), notes.sentences, pasted)


def plain_text(text: str, what: str) -> tuple[str, tuple[str, ...]]:
    """Take everything but words out of a negative prompt.

    Args:
        text: The negative prompt; may be empty.
        what: What a message calls it.

    Returns:
        The words, and notes on what was left out.

    Raises:
        GenerationError: It is far too long, or a tag is not understood.
    """
    check_text(text, what)
    notes = _Notes()
    words, loras = _read(text, notes)
    if loras:
        notes.say(f"{what} asks for {shown(loras[0].name, 60)}; LoRAs there are not used.")
    return (_tidy(words) if notes.sentences else words.strip()), notes.sentences


def escape(text: str) -> str:
    """Write words so that `parse_prompt` reads exactly them again.

    Args:
        text: What a model read.
    """
    escaped = _TO_ESCAPE.sub(lambda found: f"\\{found.group()}", text)
    return escaped.replace("\\__", "\\_\\_")


def check_text(text: str, what: str) -> str:
    """Make sure that a text can be read by a text encoder.

    Args:
        text: A prompt or negative prompt.
        what: What a message calls it.

    Raises:
        GenerationError: It is far too long, or has bytes that are no UTF-8.
    """
    if len(text) > MAX_PROMPT:
        raise GenerationError(
            "{} has {} characters; at most {} are possible.",
            Message(what),
            len(text),
            MAX_PROMPT,
        )
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise GenerationError(f"{what} is not valid text; save or type it as UTF-8.")
    return text


class _Notes:
    """Sentences on what was not used, each said once."""

    def __init__(self) -> None:
        self._sentences: dict[str, None] = {}
        self._said: set[str] = set()

    @property
    def sentences(self) -> tuple[str, ...]:
        return tuple(self._sentences)

    def say(self, sentence: str) -> None:
        self._sentences[sentence] = None

    def say_once(self, kind: str, sentence: str) -> None:
        """Say the first example of a kind only."""
        if kind not in self._said:
            self._said.add(kind)
            self.say(sentence)


def _read(prompt: str, notes: _Notes) -> tuple[str, list[LoRAUnit]]:
    loras: list[LoRAUnit] = []
    text = prompt
    for _ in range(_MAX_NESTED):
        before, text = text, _without_inner_tags(text, loras, notes)
        if text == before:
            break
    words = _Words(notes)
    words.read(text)
    return words.text(), loras


def _without_inner_tags(text: str, loras: list[LoRAUnit], notes: _Notes) -> str:
    """Replace the tags that hold no other; a backslash before one makes it words."""
    parts: list[str] = []
    done = position = 0
    while (start := text.find("<", position)) >= 0:
        position = start + 1
        if _is_kept(text, start):
            continue
        found = _TAG.match(text, start) or _OPEN_TAG.match(text, start)
        if found is not None:
            kind, inside = found["kind"].lower(), found["inside"]
            if not found.group().endswith(">"):
                notes.say(f"The tag {shown(found.group(), 60)} has no end; it ends there.")
            if kind in LORA_TAGS:
                loras.append(_parse_tag(kind, inside, notes))
                taken = " "
            else:
                taken = _other_tag(kind, inside, found.group(), notes)
        elif found := _BARE_TAG.match(text, start):
            taken = _other_tag("", "", found.group(), notes)
        else:
            continue
        parts += [text[done:start], taken]
        done = position = found.end()
    return "".join([*parts, text[done:]])


def _is_kept(text: str, position: int) -> bool:
    """Whether an odd number of backslashes stands before a position."""
    first = position
    while first and text[first - 1] == "\\":
        first -= 1
    return (position - first) % 2 == 1


def _other_tag(kind: str, inside: str, tag: str, notes: _Notes) -> str:
    """What takes the place of a tag that is no LoRA."""
    if kind in _CHOICE_TAGS:
        options = re.split(r"\|\||\||,", inside)
        first = next((option for option in options if option.strip()), "")
        notes.say(
            f"{shown(tag, 60)} is a choice; its first, {shown(first.strip(), 40)!r}, was taken."
        )
        return first
    if kind in _WILDCARD_TAGS:
        notes.say(
            f"{shown(tag, 60)} names a file of wildcards, which are not known here; left out."
        )
        return " "
    notes.say(f"{shown(tag, 60)} means nothing here and was taken out of the prompt.")
    return " "


@dataclass
class _Group:
    """A bracket that is open: what stands in it, parted by bars, and marks after colons."""

    opener: str
    options: list[list[str]] = field(default_factory=lambda: [[]])

    @property
    def whole(self) -> str:
        return "|".join("".join(option) for option in self.options)


class _Words:
    """Reads words in brackets; what has no partner is a plain character."""

    def __init__(self, notes: _Notes) -> None:
        self._notes = notes
        self._open: list[_Group] = [_Group("")]

    def add(self, text: str) -> None:
        self._open[-1].options[-1].append(text)

    def read(self, text: str) -> None:
        position = 0
        for found in _TOKEN.finditer(text):
            if found.start() < position:
                continue
            self.add(self._unmarked(text[position : found.start()]))
            position = found.end()
            if found["kept"]:
                self.add(found["kept"])
            elif found["wildcard"]:
                self._left_out(found["wildcard"], "names a file of wildcards, which are not known")
            elif found["embedding"]:
                self._left_out(found["embedding"], "is a textual inversion, which is not known")
            elif found["break"]:
                self._notes.say_once("break", "BREAK parts prompts in other programs; left out.")
                self.add(" ")
            elif found["bar"]:
                self._bar()
            elif found["bracket"] in _CLOSERS:
                position = self._close(found["bracket"], text, position)
            else:
                self._open.append(_Group(found["bracket"]))
        self.add(self._unmarked(text[position:]))

    def text(self) -> str:
        """All words; brackets that were never closed stay."""
        parts = [group.opener + group.whole for group in self._open]
        return "".join(parts)

    def _left_out(self, mark: str, why: str) -> None:
        self._notes.say(f"{shown(mark, 60)} {why} here; left out.")
        self.add(" ")

    def _bar(self) -> None:
        if self._open[-1].opener in ("{", "["):
            self._open[-1].options.append([])
        else:
            self.add("|")

    def _unmarked(self, text: str) -> str:
        plain = _MARKED_WORD.sub("", text)
        if plain != text:
            self._weighted(text)
        return plain

    def _weighted(self, example: str) -> None:
        some = shown(_SPACES.sub(" ", example.strip()), 40)
        self._notes.say_once(
            "weight",
            f"Weights of words such as {some} are not known to this model; the words are read "
            "without them. A backslash before a bracket keeps it.",
        )

    def _close(self, closer: str, text: str, position: int) -> int:
        """Put a group's words where it began; return where to read on."""
        if self._open[-1].opener != _CLOSERS[closer]:
            self.add(closer)
            return position
        group = self._open.pop()
        if group.opener == "(":
            inside, position = self._round(group.whole, text, position)
        elif group.opener == "[":
            inside = self._square(group)
        else:
            inside = self._curly(group)
        self.add(inside)
        return position

    def _round(self, whole: str, text: str, position: int) -> tuple[str, int]:
        weight = _WEIGHT.search(whole)
        if weight is not None and _is_ratio(whole, weight):
            weight = None
        self._weighted(f"({whole})")
        inside = whole if weight is None else whole[: weight.start()]
        after = _AFTER_GROUP.match(text, position)
        return inside, position if after is None else after.end()

    def _square(self, group: _Group) -> str:
        if len(group.options) > 1:
            return self._first(group, f"[{group.whole}]")
        whole = group.whole
        found = _SCHEDULE.fullmatch(whole) or _FROM_STEP.fullmatch(whole)
        if found is None:
            self._weighted(f"[{whole}]")
            return whole
        words = found["end"] if found["end"].strip() else found.groupdict().get("start") or ""
        self._notes.say(
            f"[{shown(whole, 60)}] changes the prompt between steps, which is not done here; "
            f"{shown(words.strip(), 40)!r} was taken."
        )
        return words

    def _curly(self, group: _Group) -> str:
        if len(group.options) > 1 or _COUNTED.match(group.whole):
            return self._first(group, f"{{{group.whole}}}")
        self._weighted(f"{{{group.whole}}}")
        return group.whole

    def _first(self, group: _Group, mark: str) -> str:
        options = ["".join(option) for option in group.options]
        counted = _COUNTED.match(options[0])
        if counted is not None:
            options[0] = options[0][counted.end() :]
        options = [_OPTION_WEIGHT.sub("", option, count=1) for option in options]
        kept = [option for option in options if option.strip()]
        count = max(1, int(counted["count"])) if counted is not None else 1
        taken = ", ".join(option.strip() if count > 1 else option for option in kept[:count])
        self._notes.say(
            f"{shown(mark, 60)} is a choice; its first, {shown(taken.strip(), 40)!r}, was taken."
        )
        return taken


def _is_ratio(whole: str, weight: re.Match[str]) -> bool:
    """Whether a number after a colon belongs to the one before, as in 16:9 or 10:30."""
    digits = weight.group(1).isdigit()
    return digits and whole[: weight.start()][-1:].isdigit() and ": " not in weight.group()


def _parse_tag(kind: str, inside: str, notes: _Notes) -> LoRAUnit:
    """Read a LoRA tag; positions are name, text encoder, transformer, rank (A1111)."""
    quoted = re.match(r'\s*"([^"]*)"\s*(?::(.*))?$', inside, re.DOTALL)
    name, *rest = quoted.groups() if quoted else re.split(":", inside, maxsplit=1)
    parts = rest[0].split(":") if rest and rest[0] is not None else []
    numbers: list[str] = []
    named: dict[str, str] = {}
    unused: list[str] = []
    for part in map(str.strip, parts):
        key, equals, value = part.partition("=")
        key = key.strip().lower()
        if equals and key in ("te", "unet", "w", "weight", "strength"):
            named["unet" if key in ("w", "weight", "strength") else key] = value.strip()
        elif equals or (numbers and (len(numbers) == 2 or _number(part) is None)):
            unused.append(part)
        elif part or not unused:
            numbers.append(part)
    given = named.get("unet", numbers[1] if len(numbers) > 1 else None)
    strength = given if given is not None else named.get("te", numbers[0] if numbers else None)
    encoder = named.get("te", numbers[0] if len(numbers) > 1 else strength)
    asked = _asked(name, strength)
    if encoder != strength and _number(encoder or "") != asked.strength:
        unused.insert(0, f"te={encoder}")
    if unused:
        tag = f"<{kind}:{inside}>"
        notes.say(f"Of the tag {shown(tag, 80)}, {shown(', '.join(unused), 80)} was not used.")
    return asked


def _number(text: str) -> float | None:
    """The number that a text spells; of a schedule such as ``0@0,1@0.5`` the last one."""
    last = text.split(",")[-1].partition("@")[0] if "@" in text else text
    try:
        return float(last)
    except ValueError:
        return None


def _asked(name: str, strength: str | None) -> LoRAUnit:
    """A unit of the pool: a prompt may come from anywhere, so that a tag names no file."""
    number = None if strength is None else _number(strength)
    unit = unit_of_text(name, strength if number is None else str(number))
    return LoRAUnit(name.strip(), unit.strength)


def add_triggers(text: str, triggers: Sequence[str]) -> tuple[str, list[str]]:
    """Add trigger words that a prompt does not have yet.

    A word counts as there when the prompt has it as whole words, in any case.

    Args:
        text: The prompt without tags.
        triggers: Words or phrases in the order to add them.

    Returns:
        The prompt with the missing ones after a comma, and those that were added.
    """
    added: list[str] = []
    for trigger in triggers:
        phrase = _tidy(without_tags(trigger)).strip(" ,")
        if phrase and not has_phrase(", ".join([text, *added]), phrase):
            added.append(phrase)
    return ", ".join(part for part in (text, *added) if part), added


def has_phrase(text: str, phrase: str) -> bool:
    """Tell whether a text has a phrase as whole words, in any case."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None


def without_tags(text: str) -> str:
    """Take tags such as ``<lora:name>`` out of a text."""
    return _TAG.sub(" ", text)


def slug(prompt: str, limit: int = 48) -> str:
    """Make a file name from a prompt: lower-case words of it joined by dashes."""
    text = without_tags(prompt).lower()
    words = re.sub(r"[^\w]+", "-", text).strip("-_")
    return words[:limit].strip("-_") or "picture"


def _tidy(text: str) -> str:
    """Join what the removed tags left apart."""
    joined = _SPACES.sub(" ", text)
    joined = re.sub(r" (?=[,.;])", "", joined)
    return re.sub(r"(,)(?:\s*,)+", r"\1", joined).strip(" ,")
