"""Pickles: read only as plain tensors, and never run."""

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from autolora.errors import LoRAFormatError
from autolora.lora import LoRA
from autolora.lora.add import convert_pickle, is_pickle, read_pickle


class Payload:
    """Writes a file when it is unpickled, as a malicious checkpoint would."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (open, (self.target, "w"))


TENSORS = {"a.lora_A.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16()}


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "epoch": 3}])
def test_plain_tensors_are_read(tmp_path, new_format, wrap):
    path = tmp_path / "a.ckpt"
    torch.save(wrap(TENSORS), path, _use_new_zipfile_serialization=new_format)
    assert is_pickle(path)
    found = read_pickle(path)
    assert set(found) == set(TENSORS)
    for key, tensor in TENSORS.items():
        assert torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype
    convert_pickle(path, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["b"], TENSORS["b"])


def test_numbers_parameters_and_views(tmp_path):
    path = tmp_path / "a.pt"
    base = torch.arange(12.0).reshape(3, 4)
    table = {"alpha": 8, "scale": 0.5, "turned": base.T, "p": torch.nn.Parameter(base[:2])}
    torch.save(table, path)
    found = read_pickle(path)
    assert found["alpha"].item() == 8 and found["scale"].item() == 0.5
    assert torch.equal(found["turned"], base.T) and found["turned"].is_contiguous()
    assert not found["p"].requires_grad


def test_code_is_never_run(tmp_path):
    target = tmp_path / "ran"
    plain = tmp_path / "a.bin"
    plain.write_bytes(pickle.dumps({"x": Payload(target)}, protocol=2))
    saved = tmp_path / "b.pt"
    torch.save({"x": Payload(target)}, saved)
    renamed = tmp_path / "c.safetensors"
    renamed.write_bytes(saved.read_bytes())
    for path in (plain, saved, renamed):
        with pytest.raises(LoRAFormatError, match="holds more than plain tensors"):
            read_pickle(path)
        with pytest.raises(
            LoRAFormatError, match=r"is a pickle .*, which can run code when opened"
        ):
            LoRA.load(path)
        assert not target.exists()
    # The payload does work where nobody is careful.
    pickle.loads(plain.read_bytes())
    assert target.exists()


def test_a_view_larger_than_the_file_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"x": torch.ones(1).expand(1 << 20, 1 << 20)}, path)
    with pytest.raises(LoRAFormatError, match="claims tensors larger than the file"):
        read_pickle(path)


def test_a_packed_archive_is_refused(tmp_path):
    saved = tmp_path / "a.pt"
    torch.save({"x": torch.zeros(1 << 16)}, saved)
    packed = tmp_path / "b.pt"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert packed.stat().st_size < 1 << 14
    with pytest.raises(LoRAFormatError, match=r"b\.pt is a pickle that is packed"):
        read_pickle(packed)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "no table of named tensors"),
        ({}, "no table of named tensors"),
        ({3: torch.ones(2)}, "names a tensor '3'"),
        ({"__metadata__": torch.ones(2)}, "names a tensor '__metadata__'"),
        ({"x": "text"}, "plain tensor at 'x'"),
        ({"x": [torch.ones(2)]}, "plain tensor at 'x'"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, "plain tensor at 'x'"),
        ({"x": torch.eye(2).to_sparse()}, "plain tensor at 'x'"),
        ({"x": torch.ones(2, device="meta")}, "keeps no data of 'x'"),
        ({"x\ny": "text"}, r"x\\ny"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(LoRAFormatError) as caught:
        read_pickle(path)
    message = str(caught.value)
    assert words.replace("\\\\", "\\") in message or words in message
    assert "a.pt" in message and message.isprintable() and message.endswith(".")


def test_damaged_pickles(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(TENSORS, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:40], b"\x80\x02junk", b"PK\x03\x04"):
        path.write_bytes(content)
        assert is_pickle(path)
        with pytest.raises(LoRAFormatError, match=r"a\.pt is a pickle that"):
            read_pickle(path)


def test_a_safetensors_header_may_look_like_a_pickle(tmp_path):
    """A header of 640 bytes begins with the bytes of a pickle of protocol 2."""
    from safetensors.torch import save

    for pad in range(700):
        content = save({"a": torch.ones(1)}, {"k": "x" * pad})
        if content.startswith(b"\x80\x02"):
            break
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert content.startswith(b"\x80\x02") and not is_pickle(path)
    with pytest.raises(LoRAFormatError, match="changes no layer"):
        LoRA.load(path)
