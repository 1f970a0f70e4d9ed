"""Names that adapters give to layers, against DiffSynth's own modules."""

import pytest
import torch

from autolora.families.flux1.dialects import BFL, CLIP, DIFFSYNTH, DIFFUSERS, T5, XLABS


def modules_of(path, name, **options):
    module = pytest.importorskip(path)
    with torch.device("meta"):
        model = getattr(module, name)(**options)
    return dict(model.named_modules())


def test_text_encoders():
    clip = modules_of("diffsynth.models.flux_text_encoder_clip", "FluxTextEncoderClip")
    t5 = modules_of("diffsynth.models.flux_text_encoder_t5", "FluxTextEncoderT5")
    for naming, modules, blocks in ((CLIP, clip, 12), (T5, t5, 24)):
        linear = {name for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
        named = {t.layer.replace("{i}", str(i)) for t in naming.values() for i in range(blocks)}
        assert named == linear


def test_transformer():
    modules = modules_of("diffsynth.models.flux_dit", "FluxDiT", num_blocks=1)
    for naming in (BFL, DIFFUSERS, XLABS, DIFFSYNTH):
        for target in naming.values():
            module = modules[target.layer.replace("{i}", "0")]
            if target.is_norm:
                assert module.weight.shape == (128,)
            else:
                assert isinstance(module, torch.nn.Linear)
