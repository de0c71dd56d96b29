# SPDX-License-Identifier: Apache-2.0
"""The tiny checkpoints: complete, the same each time, and able to show mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scripts import demo, tiny_gemma4

Checkpoint = Callable[[str], Path]


def load(path: Path) -> Any:
    from transformers import Gemma4ForConditionalGeneration as Model

    model, report = Model.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model


def features(model: Any, path: Path, swap: bool = False) -> torch.Tensor:
    """Features [soft tokens, text hidden] of a picture, by Hugging Face."""
    from transformers import AutoProcessor

    image = demo.picture(400, 300, seed=1)
    pixels = AutoProcessor.from_pretrained(path).image_processor(
        images=[image], return_tensors="pt"
    )
    positions = pixels["image_position_ids"]
    with torch.inference_mode():
        tower = model.model.vision_tower
        if swap:
            embed = tower.patch_embedder._position_embeddings
            tower.patch_embedder._position_embeddings = lambda ids, padding: embed(
                ids.flip(-1), padding
            )
        return model.get_image_features(
            pixels["pixel_values"], positions
        ).pooler_output[0]


@pytest.mark.parametrize("kind", ["26b", "e2b"])
def test_same_seed_same_files(
    kind: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first = checkpoint(kind)
    second = tiny_gemma4.build(tmp_path / "again", kind)
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    other = tiny_gemma4.build(tmp_path / "other", kind, seed=1)
    weights = load_file(first / "model.safetensors")
    changed = load_file(other / "model.safetensors")
    assert not any(torch.equal(weights[name], changed[name]) for name in weights)


def test_nothing_is_neutral(checkpoint: Checkpoint) -> None:
    """No norm, bias or bound has a value that leaving it out would give."""
    for kind in ("26b", "e2b"):
        for name, tensor in load_file(checkpoint(kind) / "model.safetensors").items():
            assert torch.isfinite(tensor).all(), name
            for neutral in (0.0, 1.0):
                assert not (tensor == neutral).all(), name


def test_clip_bounds_differ_and_bind(checkpoint: Checkpoint) -> None:
    path = checkpoint("e2b")
    model = load(path)
    usual = features(model, path)
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for bound in ("input_min", "input_max", "output_min", "output_max"):
            values = {
                float(getattr(module, bound))
                for name, module in model.model.vision_tower.named_modules()
                if name.startswith("encoder.layers.0.") and name.endswith(names)
            }
            assert len(values) == len(names), (names, bound)
    layer = model.model.vision_tower.encoder.layers[0]
    for linear in (
        layer.self_attn.q_proj,
        layer.self_attn.k_proj,
        layer.self_attn.v_proj,
        layer.self_attn.o_proj,
        layer.mlp.gate_proj,
        layer.mlp.up_proj,
        layer.mlp.down_proj,
    ):
        for bound in ("input_min", "input_max", "output_min", "output_max"):
            buffer = getattr(linear, bound)
            kept = buffer.clone()
            buffer.fill_(float("-inf" if bound.endswith("min") else "inf"))
            # Ten times what the features may be off by.
            assert (features(model, path) - usual).abs().max() > 1e-2, bound
            buffer.copy_(kept)


def test_swapped_coordinates_show(checkpoint: Checkpoint) -> None:
    path = checkpoint("26b")
    usual = features(load(path), path)
    assert (features(load(path), path, swap=True) - usual).abs().max() > 0.5


def test_layouts(checkpoint: Checkpoint) -> None:
    large = json.loads((checkpoint("26b") / "config.json").read_text())
    assert large["vision_config"]["standardize"]
    assert not large["vision_config"]["use_clipped_linears"]
    assert large["text_config"]["use_bidirectional_attention"] == "vision"
    assert large["text_config"]["hidden_size_per_layer_input"] == 0
    assert large["audio_config"] is None
    small = json.loads((checkpoint("e2b") / "config.json").read_text())
    assert not small["vision_config"]["standardize"]
    assert small["vision_config"]["use_clipped_linears"]
    assert small["text_config"]["use_bidirectional_attention"] is None
    assert small["text_config"]["hidden_size_per_layer_input"] > 0
    assert small["text_config"]["num_kv_shared_layers"] > 0
    assert small["audio_config"]["use_clipped_linears"]


def test_chat_template_matches_the_prompts(checkpoint: Checkpoint) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint("26b"))
    content = [{"type": "image"}, {"type": "text", "text": "the image"}]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert rendered == demo.examples()[1].prompt
    ids = processor.tokenizer.encode("the user's \u00e9\n", add_special_tokens=False)
    assert processor.tokenizer.decode(ids) == "the user's \u00e9\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "27b"}, "kind is '27b'"),
        ({"soft_tokens": 100}, "soft_tokens is 100"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"tower": {"hidden_size": 8}}, "no section tower"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_gemma4.build(tmp_path / "out", **({"kind": "26b"} | change))
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint("26b")
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert tiny_gemma4.build(path, "26b") == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="remove it"):
        tiny_gemma4.build(path, "26b", seed=5)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="remove it"):
        tiny_gemma4.build(tmp_path / "mine", "26b")


def test_nothing_is_left_of_a_failed_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_gemma4, "_fill", fail)
    with pytest.raises(KeyboardInterrupt):
        tiny_gemma4.build(tmp_path / "out", "26b")
    assert not list(tmp_path.iterdir())


def test_overrides_and_dtype(tmp_path: Path) -> None:
    path = tiny_gemma4.build(
        tmp_path / "moe",
        "26b",
        soft_tokens=70,
        dtype="bfloat16",
        text={
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
        vision={"hidden_size": 144, "head_dim": 72},
    )
    weights = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert any(".experts." in name for name in weights)
    processor = json.loads((path / "processor_config.json").read_text())
    assert processor["image_processor"]["max_soft_tokens"] == 70
    assert features(load(path), path).shape[1] == 128
