"""Adapters kept in memory: found again, read again, forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autolora.errors import LoRAFormatError, PoolError
from autolora.lora import LoRA, save_lora
from autolora.lora.lora import PreparedLoRA
from autolora.lora.pool import AdapterCache, file_identity

LAYER = "single_blocks.0.proj_out"


def write(path: Path, fill: float = 1.0, rank: int = 2) -> Path:
    factors = {LAYER: (torch.full((rank, 320), fill), torch.ones(64, rank))}
    return save_lora(path, factors, "kohya") or path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


def test_a_file_is_read_once(file: Path) -> None:
    cache = AdapterCache()
    lora = cache.load(file)
    assert cache.load(str(file)) is lora and lora.name == "one"
    assert (cache.hits, cache.misses, len(cache)) == (1, 1, 1)
    assert cache.nbytes == lora.nbytes > 0
    assert cache.load(file, "style/one").name == "style/one"
    assert lora.name == "one"
    cache.clear()
    assert cache.load(file) is not lora


def test_a_file_that_was_written_again_is_read_again(file: Path) -> None:
    cache = AdapterCache()
    lora, before = cache.load(file), file_identity(file)
    write(file, fill=3.0)
    os.utime(file, ns=(before[1], before[1]))  # same size and time, another inode
    assert file_identity(file)[:2] == before[:2]
    again = cache.load(file)
    assert again is not lora and len(cache) == 1
    assert again.delta(LAYER)[0, 0] == 3 * lora.delta(LAYER)[0, 0]
    os.utime(file, ns=(1, 1))
    assert cache.load(file) is not again
    file.unlink()
    with pytest.raises(PoolError, match="gone from the pool"):
        cache.load(file)


def test_bad_files_are_not_kept(file: Path) -> None:
    cache = AdapterCache()
    file.write_bytes(b"\x00" * 30)
    for _ in range(2):
        with pytest.raises(LoRAFormatError):
            cache.load(file)
    assert len(cache) == 0 and cache.misses == 2


def test_what_was_used_longest_ago_is_forgotten_first(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path in files:
        write(path)
    size = LoRA.load(files[0]).nbytes
    cache = AdapterCache(2 * size)
    first, second = cache.load(files[0]), cache.load(files[1])
    cache.load(files[0])
    cache.load(files[2])
    assert cache.load(files[0]) is first and len(cache) == 2 and cache.nbytes <= cache.max_bytes
    assert cache.load(files[1]) is not second
    tiny = AdapterCache(1)
    lora = tiny.load(files[0])
    assert tiny.load(files[0]) is lora, "the last one always stays"
    tiny.load(files[1])
    assert len(tiny) == 1


def test_factors_are_computed_once_and_counted(file: Path) -> None:
    cache = AdapterCache()
    lora = cache.load(file)
    ready = cache.prepare(lora, 8)
    assert cache.prepare(lora, 8) is ready and (cache.hits, cache.misses) == (1, 2)
    assert cache.nbytes == lora.nbytes + ready.nbytes and len(cache) == 1
    a, b = ready.factors(LAYER)
    assert ready.nbytes == 0  # they are the adapter's own tensors
    assert ready.factors(LAYER)[0] is a and ready.factors(LAYER)[1] is b
    assert all(torch.equal(x, y) for x, y in zip((a, b), lora.factors(LAYER), strict=True))
    assert (ready.name, ready.layers, ready.shape(LAYER)) == ("one", [LAYER], (64, 320))
    assert ready.errors == {} and ready.lora is lora
    assert cache.prepare(lora, 8, device=torch.device("cpu")).factors(LAYER)[0].device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [16.0, 4.0, 1.0, 5.0])
def test_factors_are_kept_once_in_the_type_of_the_file(file: Path, dtype, alpha: float) -> None:
    write(file, rank=16)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in load_file(file).items()
        if not name.endswith(".alpha")
    }
    stem = next(iter(tensors)).split(".")[0]
    save_file({**tensors, f"{stem}.alpha": torch.tensor(alpha)}, file)
    truth = LoRA.load(file).factors(LAYER)
    cache = AdapterCache()
    lora = cache.load(file)
    square = lora.delta(LAYER)
    ready = cache.prepare(lora, 8)
    factors = ready.factors(LAYER)
    assert all(torch.equal(f.float(), t) for f, t in zip(factors, truth, strict=True))
    assert torch.equal(lora.delta(LAYER), square)
    exact = alpha != 5  # 5 / 16 is no power of two, and rounds
    assert factors[0].dtype is dtype and factors[1].dtype is (dtype if exact else torch.float32)
    if exact:
        assert cache.nbytes <= 1.2 * file.stat().st_size
        assert factors[1].data_ptr() in {t.data_ptr() for t in lora._layers[LAYER].tensors}
    assert torch.equal(ready.factors(LAYER)[1], factors[1])


def test_factors_that_the_type_cannot_hold_scaled_are_kept_wide(file: Path) -> None:
    write(file, rank=16)
    tiny = {
        name: torch.full(tensor.shape, 2.0**-24).to(torch.float16)  # its smallest number
        for name, tensor in load_file(file).items()
        if not name.endswith(".alpha")
    }
    stem = next(iter(tiny)).split(".")[0]
    save_file({**tiny, f"{stem}.alpha": torch.tensor(8.0)}, file)
    lora = LoRA.load(file)
    ready = PreparedLoRA(lora, 8)
    _, b = ready.factors(LAYER)
    assert b.dtype is torch.float32 and bool((b == 2.0**-25).all())
    assert ready.nbytes == b.nbytes


def test_adapters_made_in_memory_are_prepared_too(file: Path) -> None:
    cache = AdapterCache()
    pair = torch.ones(2, 320), torch.ones(64, 2)
    one, two = (LoRA.from_factors("same", {LAYER: pair}) for _ in range(2))
    assert cache.prepare(one, 8) is cache.prepare(one, 8)
    assert cache.prepare(two, 8) is not cache.prepare(one, 8)
    assert len(cache) == 2
    cache.max_bytes = 1
    cache.load(file)
    assert len(cache) == 1
    assert cache.prepare(one, 8).lora is one


def test_a_file_written_again_while_the_old_one_is_prepared(file: Path, monkeypatch) -> None:
    """What is made of the old file does not take the place of the new one."""
    cache = AdapterCache()
    old = cache.load(file)
    news: list[LoRA] = []

    def rewrite(*args: object) -> PreparedLoRA:
        write(file, fill=3.0, rank=4)
        news.append(cache.load(file))
        return PreparedLoRA(*args)

    monkeypatch.setattr("autolora.lora.lora.PreparedLoRA", rewrite)
    assert cache.prepare(old, 8).lora is old
    assert cache.load(file) is news[0] is not old and len(cache) == 2


def test_several_threads_read_a_file_once(file: Path) -> None:
    cache, seen = AdapterCache(), []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        lora = cache.load(file)
        seen.append((lora, cache.prepare(lora, 4)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(lora) for lora, _ in seen}) == 1 == len({id(ready) for _, ready in seen})
    assert cache.misses == 2 and cache.hits == 14
    assert not cache._busy


def test_importing_the_cache_loads_no_torch() -> None:
    code = "import sys, autolora.lora.pool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prepared_adapters_are_pinned_to_a_gpu(file: Path) -> None:
    cache = AdapterCache()
    lora, device = cache.load(file), torch.device("cuda")
    ready = cache.prepare(lora, 8, device=device)
    assert cache.prepare(lora, 8, device=device) is ready
    for tensor, own in zip(ready.factors(LAYER), lora.factors(LAYER), strict=True):
        assert tensor.is_cuda and torch.equal(tensor.cpu(), own)
