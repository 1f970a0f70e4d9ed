"""Workflows of ComfyUI are listed as far as they are plain values."""

import json

import pytest

from autolora.generate.comfy import Node, how_made, read_workflow


def test_nodes_are_read_with_their_plain_inputs() -> None:
    workflow = {
        "6": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": "a cat", "clip": ["4", 1]},
            "_meta": {"title": "Prompt"},
        },
        "3": {"class_type": "KSampler", "inputs": {"seed": 7, "cfg": 3.5, "model": ["4", 0]}},
        "9": {"class_type": "Empty"},
    }
    assert read_workflow(json.dumps(workflow)) == {
        "6": Node("CLIPTextEncode", {"text": "a cat"}),
        "3": Node("KSampler", {"seed": 7, "cfg": 3.5}),
        "9": Node("Empty", {}),
    }


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "[]", "3", '{"a": 1}', '{"a": {"class_type": 1}}', "[" * 100_000, '{"1": null}'],
)
def test_what_is_no_workflow_has_no_nodes(text: str) -> None:
    assert read_workflow(text) == {}


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


FLUX = {
    "1": node("UNETLoader", unet_name="flux1-dev.safetensors"),
    "2": node(
        "LoraLoaderModelOnly", model=["1", 0], lora_name="a/one.safetensors", strength_model=0.7
    ),
    "3": node("LoraLoader", model=["2", 0], lora_name="two.safetensors", strength_model=0.5),
    "4": node("CLIPTextEncode", text=["5", 0], clip=["3", 1]),
    "5": node("StringConcatenate", string_a="a neon cat", string_b=["6", 0], delimiter=", "),
    "6": node("PrimitiveString", value="at night"),
    "7": node("FluxGuidance", guidance=3.5, conditioning=["4", 0]),
    "8": node("RandomNoise", noise_seed=["9", 0]),
    "9": node("Seed (rgthree)", seed=558679450481796),
    "10": node("BasicScheduler", steps=28, model=["3", 0]),
    "11": node("BasicGuider", model=["3", 0], conditioning=["7", 0]),
    "12": node("EmptySD3LatentImage", width=832, height=["13", 0]),
    "13": node("PrimitiveInt", value=1216),
    "14": node(
        "SamplerCustomAdvanced",
        noise=["8", 0],
        guider=["11", 0],
        sigmas=["10", 0],
        latent_image=["12", 0],
    ),
    "15": node("SaveImage", images=["14", 0]),
    "20": node("LoraLoader", lora_name="aside.safetensors", strength_model=1.0),
    "21": node("KSamplerSelect", sampler_name="euler"),
}


def test_a_workflow_is_followed_back_from_its_sampler() -> None:
    made = how_made(read_workflow(json.dumps(FLUX)))
    assert made.prompt == "a neon cat\nat night" and made.negative_prompt == ""
    values = {"seed": 558679450481796, "steps": 28, "guidance": 3.5, "width": 832, "height": 1216}
    assert made.values == values
    assert made.loras == (("a/one.safetensors", 0.7), ("two.safetensors", 0.5))


def test_both_prompts_of_a_sampler() -> None:
    workflow = {
        "1": node("CLIPTextEncode", text="ugly"),
        "2": node("CLIPTextEncodeFlux", clip_l="a cat", t5xxl="a cat", guidance=2.5),
        "3": node("KSampler", positive=["2", 0], negative=["1", 0], seed=1, steps=4, cfg=1.0),
    }
    made = how_made(read_workflow(json.dumps(workflow)))
    assert (made.prompt, made.negative_prompt) == ("a cat", "ugly")
    assert made.values["guidance"] == 2.5
    workflow["3"]["inputs"]["negative"] = ["4", 0]
    workflow["4"] = node("ConditioningZeroOut", conditioning=["2", 0])
    assert how_made(read_workflow(json.dumps(workflow))).negative_prompt == ""


LOADERS = [
    node(
        "Power Lora Loader (rgthree)",
        lora_1={"on": True, "lora": "x.safetensors", "strength": 0.8, "strengthTwo": None},
        lora_2={"on": False, "lora": "off.safetensors", "strength": 1},
        lora_3={"on": True, "lora": "None", "strength": 1},
        **{"PowerLoraLoaderHeaderWidget": {"type": "Header"}, "Add Lora": ""},
    ),
    node(
        "Lora Loader (LoraManager)",
        text="<lora:x.safetensors:0.8>",
        loras={
            "__value__": [
                {"name": "x.safetensors", "strength": "0.80", "active": True},
                {"name": "off", "strength": 1.0, "active": False},
            ]
        },
    ),
    node("Any Loader", stack=[{"name": "x.safetensors", "strength": 0.8, "enabled": True}]),
    node("Lora Loader (LoraManager)", text="<lora:x.safetensors:0.80>", loras=[]),
    node("Lora Loader Stack (rgthree)", lora_01="x.safetensors", strength_01=0.8, lora_02="None"),
    node(
        "CR LoRA Stack",
        switch_1="On",
        lora_name_1="x.safetensors",
        model_weight_1=0.8,
        switch_2="Off",
        lora_name_2="off.safetensors",
        model_weight_2=1.0,
    ),
    node(
        "LoRA Stacker",
        input_mode="simple",
        lora_count=1,
        lora_name_1="x.safetensors",
        lora_wt_1=0.8,
        model_str_1=0.1,
        lora_name_2="off.safetensors",
        lora_wt_2=1.0,
    ),
    node("easy loraStack", num_loras=1, lora_1_name="x.safetensors", lora_1_strength=0.8),
]


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader["class_type"])
def test_active_loras_of_loaders(loader: dict) -> None:
    made = how_made(read_workflow(json.dumps({"1": loader})))
    assert made.loras == (("x.safetensors", 0.8),)


def test_circles_end() -> None:
    workflow = {
        "1": node("CLIPTextEncode", text=["2", 0]),
        "2": node("Text", text=["1", 0], seed=["2", 0]),
        "3": node("KSampler", positive=["1", 0], seed=["2", 0], model=["3", 0]),
    }
    assert how_made(read_workflow(json.dumps(workflow))).prompt == ""
