"""What of a LoRA's metadata is searched, and how a change of it is seen."""

from autolora.lora import Metadata
from autolora.retrieval.index import metadata_texts, sidecar_stamps


def test_frequent_caption_words_stand_in_for_tags() -> None:
    suggested = Metadata(title="Zork", suggestions=["night", "sign"])
    assert metadata_texts(suggested) == [("title", "Zork"), ("tag", "night"), ("tag", "sign")]
    tagged = Metadata(title="Zork", tags=["glow"], suggestions=["night"])
    assert metadata_texts(tagged) == [("title", "Zork"), ("tag", "glow")]


def test_a_change_of_any_file_beside_is_seen(tmp_path) -> None:
    lora = tmp_path / "a.v1.safetensors"
    lora.write_bytes(b"")

    def stamp() -> str:
        return sidecar_stamps(tmp_path, {"key": lora})["key"]

    before = stamp()
    for name in ("a.v1.autolora.yaml", "a.v1.json", "a.v1.png", "README.md"):
        (tmp_path / name).write_text("x")
        assert stamp() != before, name
        before = stamp()
    (tmp_path / "b.json").write_text("x")
    (tmp_path / "README.txt").write_text("x")
    (tmp_path / "a.v1.second.safetensors").write_text("x")  # a LoRA of its own
    assert stamp() == before
