"""The parsers of metadata take whatever stands in a file."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autolora.lora.covers import embedded_covers
from autolora.lora.fields import plain_text
from autolora.lora.metadata import SIDECARS, parse_card, parse_header, parse_user
from tests.lora.metadata_samples import A1111, CIVITAI, HEADER, MANAGER

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
MORE = "strength strength_min strength_max strength_range images widget instance_prompt captions"
OTHERS = "ModelName UserTitle Tags BaseModel TrainedWords trainedWords name baseModel strengthMin"
NAMES = sorted(
    {*MANAGER, *A1111, *CIVITAI, *HEADER, *MORE.split(), *OTHERS.split(), "ssmd_cover_images"}
)


UNSAFE = {chr(n) for n in (*range(32), *range(0x7F, 0xA0), 0x202E, 0x2066, 0xD800)} - {"\n"}


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(NAMES), JSON))
def test_parsers_take_anything(entries):
    embedded_covers(entries)
    for parse in (*dict(SIDECARS).values(), parse_header, parse_card, parse_user):
        fields, problems = parse(entries)
        assert all(isinstance(problem, str) for problem in problems)
        for name, value in fields.items():
            assert value not in ("", [], None) or parse is parse_user
            if name in ("trigger_words", "tags", "captions", "suggestions"):
                assert all(isinstance(word, str) for word in value)
            if name in ("title", "description", "base_model"):
                assert not set(value) & UNSAFE


def test_plain_text_keeps_what_is_no_markup():
    assert plain_text("strength < 1 and > 0 &amp;") == "strength < 1 and > 0 &amp;"
    assert plain_text("<p>a</p>\n<p>b&lt;c</p>") == "a\nb<c"
