"""Files are known by their content: hashes against hashlib and a naive reading of the format."""

import hashlib
import itertools
import json
import os
import struct
from pathlib import Path

import pytest

from autolora.generate import reproduce
from autolora.generate.reproduce import data_sha256, fingerprint

_CLOCK = itertools.count(10**18, 10**9)


def write(path: Path, content: bytes) -> None:
    """Write a file with a time of its own, however coarse the file system's clock is."""
    path.write_bytes(content)
    now = next(_CLOCK)
    os.utime(path, ns=(now, now))


def safetensors(metadata: dict, data: bytes) -> bytes:
    entry = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": metadata, "x": entry}).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_the_data_hash_does_not_know_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    data = os.urandom(3_000_000)
    for metadata in ({}, {"title": "edited afterwards"}):
        write(path, safetensors(metadata, data))
        assert data_sha256(path) == hashlib.sha256(data).hexdigest()
    write(path, safetensors({}, data[:-1] + b"\0\0"))
    assert data_sha256(path) != hashlib.sha256(data).hexdigest()


def test_small_files_are_hashed_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 1000)
    assert fingerprint(path) == f"sha256:{hashlib.sha256(b'abc' * 1000).hexdigest()}"


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "MAX_WHOLE_BYTES", 1000)
    monkeypatch.setattr(reproduce, "SAMPLES", 5)
    monkeypatch.setattr(reproduce, "SAMPLE_BYTES", 10)
    content = bytearray(os.urandom(1001))
    path = tmp_path / "a"
    found = set()
    for place, seen in ((None, True), (0, True), (1000, True), (496, True), (300, False)):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        write(path, changed)
        before = len(found)
        found.add(fingerprint(path))
        assert (len(found) > before) is seen, place
    assert all(text.startswith("sampled:") for text in found)
    write(path, content[:-1])
    assert fingerprint(path) not in found


def test_the_gates_of_the_package_are_found() -> None:
    from autolora.config import load_config
    from autolora.fusion import load_gates

    path = reproduce.shipped_gate(load_config("tiny"))
    assert path is not None and len(load_gates(path).state_dict())
