"""Names that stand in a prompt, found without a scan."""

from autolora.retrieval.index import TextRow
from autolora.retrieval.prompt_terms import WordIndex, read_words


def test_word_index_equals_a_scan() -> None:
    rows = [
        TextRow(0, "title", "pixel art style"),
        TextRow(1, "trigger", "elephants"),
        TextRow(2, "tag", "art"),
        TextRow(3, "title", "blue"),
        TextRow(4, "captions", "elephant"),
    ]
    found = WordIndex(rows).find(read_words("pixel art of one elephant, blue"))
    assert {(m.lora, m.covers) for m in found} == {(0, (0, 1)), (1, (4,))}


def test_of_a_names_two_forms_the_longer_match_counts() -> None:
    rows = [TextRow(0, "title", "style neon style")]
    index = WordIndex(rows)
    (match,) = index.find(read_words("a neon sign"))
    assert match.covers == (1,)
    (match,) = index.find(read_words("neon, then style neon style"))
    assert match.covers == (3, 4, 5)
