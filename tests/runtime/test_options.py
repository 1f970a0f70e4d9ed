"""What a device can do, what fits into its memory, and what is fallen back to."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from autolora.config import MemorySettings, PipelineConfig
from autolora.errors import ConfigError
from autolora.families.flux1.sizes import FLUX1_DEV
from autolora.runtime import hardware
from autolora.runtime.hardware import (
    Hardware,
    hardware_of,
    machine_memory,
    settle_types,
    why_no_cuda,
)
from autolora.runtime.memory import GIB, all_needs, estimate, plan_memory

CPU = Hardware("cpu", "CPU", 64 * GIB, 60 * GIB)
H100 = Hardware("cuda:0", "H100", 80 * GIB, 79 * GIB, (9, 0), float8_compute=True)
RTX_3060 = Hardware("cuda:0", "RTX 3060", 12 * GIB, int(11.6 * GIB), (8, 6))
RTX_2080 = Hardware("cuda:0", "RTX 2080", 8 * GIB, 7 * GIB, (7, 5), bfloat16=False)
NO_FLOAT8 = Hardware("mps:0", "M1", 16 * GIB, 12 * GIB, float8_storage=False)


def config(**changes) -> PipelineConfig:
    return PipelineConfig("x", kind="flux1", width=1024, height=1024, **changes)


def test_estimates_agree_with_published_measurements() -> None:
    """GiB at 1024 x 1024 by diffusers with bfloat16 text encoders; see `runtime.memory`."""

    def peak(storage: str, offload: str) -> float:
        return estimate(FLUX1_DEV, storage, MemorySettings(offload), 1024, 1024).device / GIB

    assert peak("bfloat16", "none") == pytest.approx(36.2, rel=0.05)
    assert peak("bfloat16", "parts") == pytest.approx(23.3, rel=0.07)
    assert peak("float8", "parts") == pytest.approx(12.3, rel=0.1)


def test_every_saving_saves() -> None:
    needs = {
        (n.storage, n.text_storage, n.offload): n
        for n in all_needs(FLUX1_DEV, MemorySettings(), 1024, 1024)
    }
    none, parts, layers = (needs["float8", "auto", way] for way in ("none", "parts", "layers"))
    assert none.device > parts.device > layers.device
    assert none.machine == 0 and parts.machine == layers.machine > none.device * 0.8
    assert needs["float8", "float8", "none"].device < none.device
    assert needs["nf4", "float8", "none"].device < needs["float8", "float8", "none"].device

    def at(size: int, **changes) -> float:
        return estimate(FLUX1_DEV, "float8", MemorySettings("layers", **changes), size, size).device

    assert at(512) < at(1024) < at(2048)
    assert at(2048, tiled=True) < at(2048) / 2


@pytest.mark.parametrize(
    ("card", "changes", "offload"),
    [
        (H100, {}, "none"),
        (RTX_3060, {}, "layers"),
        (RTX_3060, {"storage": "nf4"}, "parts"),
        (replace(RTX_3060, free=23 * GIB, total=24 * GIB), {}, "parts"),
        (H100, {"memory": MemorySettings("layers")}, "layers"),
        (H100, {"memory": MemorySettings(vram_limit=6.0)}, "layers"),
    ],
)
def test_the_first_offload_that_fits_is_taken(card: Hardware, changes, offload: str) -> None:
    asked = config(**changes)
    memory, notes = plan_memory(asked, asked.storage, FLUX1_DEV, card, 2, 64 * GIB)
    assert memory.offload == offload
    assert bool(notes) == (asked.memory.offload == "auto" and offload != "none")
    if offload != "layers":
        assert memory.vram_limit is None
    elif asked.memory.vram_limit is not None:
        assert memory.vram_limit == asked.memory.vram_limit
    else:
        # A step needs 1.2 GiB beside the layers by measurements, and a preview about as much; the
        # finished picture, which needs far more, is decoded when they have left.
        assert 1.8 < card.total / GIB - memory.vram_limit < 2.6


def test_a_tiny_card_keeps_at_least_a_few_layers() -> None:
    card = replace(RTX_3060, total=2 * GIB, free=2 * GIB)
    asked = replace(config(memory=MemorySettings("layers")), width=512, height=512)
    memory, _ = plan_memory(asked, "float8", FLUX1_DEV, card, 2, 64 * GIB)
    assert memory.vram_limit == 0.5


def test_a_preview_has_room_beside_layers_too() -> None:
    """By measurements decoding takes 4.5 GiB at 1024 x 1024; a quarter of that at half a side."""
    asked = replace(config(memory=MemorySettings("layers")), width=512, height=512)
    memory, _ = plan_memory(asked, "float8", FLUX1_DEV, RTX_3060, 2, 64 * GIB)
    assert memory.vram_limit == pytest.approx(12 - 4.5 / 4 - 0.6, abs=0.05)


def test_the_largest_part_decides_where_parts_take_turns() -> None:
    texts = 2 * (FLUX1_DEV.text_encoder + FLUX1_DEV.text_encoder_2)
    with_plain, with_float8 = (
        estimate(FLUX1_DEV, "nf4", MemorySettings("parts", text_storage=kept), 512, 512).device
        for kept in ("auto", "float8")
    )
    assert with_plain > texts > with_float8


def test_a_reserve_is_kept_beside_what_is_counted() -> None:
    """The driver's context and fragmentation, beside weights and the 1.2 GiB of a step."""
    need = estimate(FLUX1_DEV, "float8", MemorySettings("parts"), 1024, 1024)
    assert (need.device - FLUX1_DEV.denoiser.parameters) / GIB > 1.2 + 0.5


def test_packed_weights_are_not_moved_layer_by_layer() -> None:
    card = replace(RTX_3060, total=6 * GIB, free=6 * GIB)
    asked = config(storage="nf4", memory=MemorySettings(text_storage="float8"))
    with pytest.raises(ConfigError, match=r"does not fit: nf4 .* and offload parts needs"):
        plan_memory(asked, "nf4", FLUX1_DEV, card, 2, 64 * GIB)


def test_previews_are_no_larger_than_is_reckoned_with() -> None:
    from autolora.families.flux1 import FAMILY
    from autolora.generate.sample import PREVIEW_SIDE
    from autolora.runtime.memory import PREVIEW_PIXELS

    assert PREVIEW_SIDE * FAMILY.factor == PREVIEW_PIXELS


def test_what_is_kept_in_bfloat16_is_computed_in_it_on_a_cpu_too() -> None:
    on_card, on_cpu = (
        estimate(FLUX1_DEV, "bfloat16", MemorySettings("none"), 512, 512, size) for size in (2, 4)
    )
    assert on_card == on_cpu


@pytest.mark.parametrize(
    ("card", "changes"),
    [
        (RTX_3060, {"memory": MemorySettings("none")}),
        (RTX_3060, {"memory": MemorySettings("parts"), "storage": "bfloat16"}),
        (replace(RTX_3060, free=2 * GIB), {}),
        (replace(CPU, free=8 * GIB), {}),
    ],
)
def test_too_little_memory_says_what_each_option_needs(card: Hardware, changes) -> None:
    asked = config(**changes)
    with pytest.raises(ConfigError) as caught:
        plan_memory(asked, asked.storage, FLUX1_DEV, card, 2, 64 * GIB)
    message = str(caught.value)
    assert "\n" not in message and "does not fit" in message
    ways = " and offload" if card.capability else " "
    for words in (f"{card.free / GIB:.1f} GiB free", f"nf4 with float8 text encoders{ways}"):
        assert words in message
    assert ("offload" in message) == (card.capability is not None), "a CPU has no choice"


def test_what_waits_must_fit_into_the_machine() -> None:
    with pytest.raises(ConfigError, match=r"wait in the machine's memory, which has 8\.0 GiB"):
        plan_memory(config(), "float8", FLUX1_DEV, RTX_3060, 2, 8 * GIB)


def test_on_a_cpu_nothing_is_offloaded() -> None:
    asked = config(memory=MemorySettings("layers"))
    memory, notes = plan_memory(asked, "float8", FLUX1_DEV, CPU, 4, 60 * GIB)
    assert memory.offload == "none" and "Nothing is offloaded" in notes[0]
    asked = config(memory=MemorySettings(vram_limit=6.0))
    assert plan_memory(asked, "float8", FLUX1_DEV, CPU, 4)[0].vram_limit is None


@pytest.mark.parametrize(
    ("device", "asked", "expected", "words"),
    [
        (H100, {}, ("float8", "bfloat16"), ""),
        (CPU, {}, ("float8", "bfloat16"), ""),
        (replace(CPU, bfloat16=False), {}, ("float8", "float32"), ""),
        (CPU, {"storage": "bfloat16"}, ("bfloat16", "bfloat16"), ""),
        (RTX_2080, {}, ("float8", "float32"), "does not multiply bfloat16"),
        (RTX_2080, {"compute": "bfloat16"}, ("float8", "bfloat16"), ""),
        (NO_FLOAT8, {}, ("bfloat16", "bfloat16"), "cannot keep float8"),
        (
            RTX_3060,
            {"storage": "torchao_float8_dynamic"},
            ("float8", "bfloat16"),
            "does not multiply float8",
        ),
    ],
)
def test_types_fall_back_and_say_so(device, asked, expected, words: str) -> None:
    storage, compute, notes = settle_types(config(**asked), device)
    assert (storage, compute) == expected
    assert [words in note for note in notes] == ([True] if words else [])


def test_a_storage_whose_library_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from autolora.runtime import hardware as types

    monkeypatch.setattr(types, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes, which is not installed.*autolora\[quant"):
        settle_types(config(storage="nf4"), H100)


def test_this_machine_is_described() -> None:
    import torch

    cpu = hardware_of(torch.device("cpu"))
    total, free = machine_memory()
    assert (cpu.device, cpu.capability, cpu.float8_storage) == ("cpu", None, True)
    if sys.platform == "linux":
        assert total and free and cpu.total == total and free <= total
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        assert cpu.bfloat16 == bool({"avx512_bf16", "amx_tile"} & set(flags))


@pytest.mark.parametrize(
    ("capability", "bfloat16", "float8"),
    [((7, 5), False, False), ((8, 0), True, False), ((8, 9), True, True), ((9, 0), True, True)],
)
def test_a_card_is_described(monkeypatch, capability, bfloat16: bool, float8: bool) -> None:
    import torch

    from tests.families.flux1 import pretended

    pretended.answer(monkeypatch, 12 * GIB, capability=capability)
    found = hardware_of(torch.device("cuda"))
    assert (found.bfloat16, found.float8_compute) == (bfloat16, float8)
    assert (found.device, found.capability) == ("cuda:0", capability)
    assert found.total == 12 * GIB and found.total - found.free == pretended.CONTEXT
    assert hardware.all_cards() == [found]


@pytest.mark.parametrize(
    ("built", "driver", "words"),
    [
        (None, None, "install the driver first"),
        (None, "12.4", "wheel for CUDA 12.4 or older"),
        ("12.8", None, "no NVIDIA driver answers"),
        ("13.0", "12.4", r"the driver knows CUDA 12.4 at most; .*\+cu124"),
        ("12.10", "12.8", r"the driver knows CUDA 12.8 at most"),
        ("12.4", "12.8", "no card can be used"),
    ],
)
def test_a_missing_card_is_explained(
    monkeypatch: pytest.MonkeyPatch, built: str | None, driver: str | None, words: str
) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(hardware, "driver_cuda", lambda: driver)
    assert __import__("re").search(words, why_no_cuda())


def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '| Driver Version: 550.1  CUDA Version: 12.4 |'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert hardware.driver_cuda() == "12.4"
    monkeypatch.setenv("PATH", "")
    assert hardware.driver_cuda() is None
