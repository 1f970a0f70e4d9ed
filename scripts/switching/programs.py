"""The programs that are compared: how each goes from one set of adapters to another.

All work on the same kind of layers (those inside the blocks). AutoLoRA and DiffSynth act beside
DiffSynth's float8 layers. PEFT knows no float8 storage and gets plain linears of the computation
type, which costs it nothing in a switch: no program reads or writes base weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from autolora.fusion import detach, make_ready, switch
from autolora.lora.pool import AdapterCache
from scripts.switching.files import AdapterFiles

Wanted = Sequence[tuple[AdapterFiles, float]]


class AutoLoRA:
    """Our own: prepared adapters in a cache, layers kept from one set to the next."""

    def __init__(self, dit: nn.Module, dtype: torch.dtype, strategy: str, gates: Any = None):
        self.dit, self.dtype, self.strategy, self.gates = dit, dtype, strategy, gates
        self.device = next(dit.parameters()).device
        self.cache = AdapterCache(8 << 30)

    def switch(self, wanted: Wanted) -> None:
        """Switch and compute all that the first step would, so that nothing is hidden in it."""
        pairs = [
            (self.cache.prepare(self.cache.load(files.plain), 64, device=self.device), strength)
            for files, strength in wanted
        ]
        switch(self.dit, pairs, self.strategy, self.gates)
        make_ready(self.dit, self.dtype, self.device)

    def forget(self) -> None:
        """Make the next switch a cold one: nothing parsed is left."""
        self.cache.clear()

    def close(self) -> None:
        """Take all out."""
        detach(self.dit)


class DiffSynth:
    """``load_lora`` and ``clear_lora`` of DiffSynth's pipeline, hot-loaded beside its layers."""

    def __init__(self, pipe: Any, dit: nn.Module, keep: bool):
        self.pipe, self.dit = pipe, dit
        self.kept: dict[str, dict[str, torch.Tensor]] | None = {} if keep else None

    def switch(self, wanted: Wanted) -> None:
        """Clear and load all; it has no way to exchange one."""
        from diffsynth.core import load_state_dict

        self.pipe.clear_lora(verbose=0)
        for files, strength in wanted:
            source: dict[str, Any] = {"lora_config": str(files.plain)}
            if self.kept is not None:
                if files.name not in self.kept:
                    self.kept[files.name] = load_state_dict(
                        str(files.plain), torch_dtype=self.pipe.torch_dtype, device=self.pipe.device
                    )
                source = {"state_dict": self.kept[files.name]}
            self.pipe.load_lora(self.dit, **source, alpha=strength, hotload=True, verbose=0)

    def forget(self) -> None:
        """It keeps no file by itself."""

    def close(self) -> None:
        """Take all out."""
        self.pipe.clear_lora(verbose=0)


class PeftHotswap:
    """``peft.utils.hotswap``: three slots whose numbers are exchanged."""

    def __init__(self, dit: nn.Module, first: Wanted, keep: bool):
        from peft import LoraConfig, LoraModel

        self.slots = [f"slot{number}" for number in range(len(first))]
        configs = [LoraConfig.from_pretrained(str(files.peft)) for files, _ in first]
        self.model = LoraModel(dit, configs[0], self.slots[0])
        for slot, config in zip(self.slots[1:], configs[1:], strict=True):
            self.model.peft_config[slot] = config
            self.model.inject_adapter(dit, slot)
        self.model.set_adapter(self.slots)
        self.model.requires_grad_(False)
        self.device = next(dit.parameters()).device
        self.kept: dict[Path, dict[str, torch.Tensor]] | None = {} if keep else None
        self.switch(first)

    def switch(self, wanted: Wanted) -> None:
        """Exchange the numbers of every slot."""
        from peft import LoraConfig
        from peft.utils.hotswap import hotswap_adapter_from_state_dict

        for slot, (files, strength) in zip(self.slots, wanted, strict=True):
            config = LoraConfig.from_pretrained(str(files.peft))
            state = self._read(files.peft / "adapter_model.safetensors")
            named = {
                key.replace(".weight", f".{slot}.weight"): tensor for key, tensor in state.items()
            }
            hotswap_adapter_from_state_dict(self.model.model, named, slot, config)
            self._scale(slot, strength)

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        if self.kept is None:
            return load_file(path, device=str(self.device))
        if path not in self.kept:
            self.kept[path] = load_file(path, device=str(self.device))
        return self.kept[path]

    def _scale(self, slot: str, strength: float) -> None:
        from peft.tuners.lora import LoraLayer

        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale(slot, strength)

    def forget(self) -> None:
        """It keeps no file by itself."""

    def close(self) -> None:
        """Take all out."""
        self.model.unload()


class PeftLoaded:
    """PEFT with every adapter loaded beforehand; a switch only says which are active."""

    def __init__(self, dit: nn.Module, files: Sequence[AdapterFiles]):
        from peft import LoraConfig, LoraModel, set_peft_model_state_dict

        config = LoraConfig.from_pretrained(str(files[0].peft))
        self.model = LoraModel(dit, config, files[0].name)
        for entry in files[1:]:
            self.model.peft_config[entry.name] = LoraConfig.from_pretrained(str(entry.peft))
            self.model.inject_adapter(dit, entry.name)
        for entry in files:
            state = load_file(entry.peft / "adapter_model.safetensors")
            prefixed = {f"model.{key}": tensor for key, tensor in state.items()}
            set_peft_model_state_dict(self.model, prefixed, entry.name)
        self.model.requires_grad_(False)

    def switch(self, wanted: Wanted) -> None:
        """Say which adapters are active, and how strongly."""
        from peft.tuners.lora import LoraLayer

        self.model.set_adapter([files.name for files, _ in wanted], inference_mode=True)
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                for files, strength in wanted:
                    module.set_scale(files.name, strength)

    def forget(self) -> None:
        """All stay loaded."""

    def close(self) -> None:
        """Take all out."""
        self.model.unload()


def block_layers(dit: nn.Module) -> Mapping[str, tuple[int, int]]:
    """Shapes of the linear layers inside the blocks, where adapters usually are."""
    from autolora.families.flux1.layers import LAYERS

    return {name: shape for name, shape in LAYERS.shapes(dit).items() if "blocks." in name}
