# SPDX-License-Identifier: Apache-2.0
"""The engine benchmark: what it asks of vLLM, and what it makes of the answers."""

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.utils.argparse_utils import FlexibleArgumentParser

from scripts import bench_engine, real_gemma4, worker


@pytest.mark.parametrize("shrink", [1, 64, 100_000])
@pytest.mark.parametrize("name", bench_engine.workloads(1))
def test_workloads_are_options_of_vllm(name: str, shrink: int) -> None:
    bench, options = bench_engine.workloads(shrink)[name]
    parser = FlexibleArgumentParser()
    importlib.import_module(f"vllm.benchmarks.{bench}").add_cli_args(parser)
    args = parser.parse_args([*options, "--model", "none"])
    if bench == "throughput":
        from vllm.benchmarks.throughput import validate_args

        validate_args(args)
        assert args.dataset_name == ("random-mm" if "chat" in name else "random")
    if bench == "latency":
        lengths = args.input_len, args.output_len, args.batch_size
    else:
        lengths = args.random_input_len, args.random_output_len, args.num_prompts
    assert min(lengths) >= 1
    assert lengths[0] + lengths[1] <= bench_engine.STEP_TOKENS
    if "chat" in name:
        kind = "video" if "video" in name else "image"
        limits = args.random_mm_limit_mm_per_prompt
        assert limits.pop(kind) == args.random_mm_base_items_per_request
        assert list(limits.values()) == [0]
        shapes = {"image": (*bench_engine.IMAGE, 1), "video": bench_engine.VIDEO}
        assert args.random_mm_bucket_config == {shapes[kind]: 1.0}


class FakeEngine:
    """Answers like an engine: the first time is slow."""

    def __init__(self, *tokens: list[list[int]]) -> None:
        self.seeds: list[int] = []
        self.tokens = list(tokens)

    def __call__(
        self,
        method: str,
        bench: str = "",
        options: list[str] = [],  # noqa: B006
        seed: int = 0,
        greedy: bool = False,
    ) -> Any:
        if method == "preempted":
            return 3 * len(self.seeds)
        if greedy:
            if not self.seeds:
                self.seeds.append(seed)
            return {"seconds": 100.0, "answered": self.tokens.pop(0)}
        self.seeds.append(seed)
        return {"seconds": float(len(self.seeds) - 1)}


@pytest.mark.parametrize("images", [False, True])
def test_serving_leaves_the_warm_up_out(images: bool) -> None:
    engines = {
        # It answers twice.
        "triton": FakeEngine([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 9]]),
        "patched": FakeEngine([[1, 2, 9], [9, 5, 6]]),
    }
    options = ["--batch-size", "2"] + (["random-mm"] if images else [])
    # Three turns, if there is time for no more.
    given: Any = (engines, "a", "latency", options, 7, 0.0)
    records = list(bench_engine.serve(*given))
    assert [record["tree"] for record in records] == ["triton", "patched"]
    first = 2.0 if images else 1.0
    for record in records:
        assert (record["prompts"], record["preempted"]) == (2, 3 * (5 if images else 4))
        assert record["samples"] == {"seconds": [first, first + 1, first + 2]}
        assert record["median"] == first + 1
    counts = {"requests": 2, "tokens": 6, "with": "triton"}
    assert records[0]["agreement"] == counts | {"first": 2, "equal": 5}
    assert records[1]["agreement"] == counts | {"first": 1, "equal": 2}
    # No image is seen twice.
    seeds = [0, 1, 2, 3, 4] if images else [0] * 4
    assert all(engine.seeds == seeds for engine in engines.values())


def test_long_workloads_have_fewer_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_engine, "LONG", -1)
    engines: Any = {"release": FakeEngine([[1, 2]], [[1, 3]])}
    given = (engines, "a", "latency", ["--batch-size", "1"], 7, 0.0)
    [record] = bench_engine.serve(*given)
    assert record["samples"]["seconds"] == [1.0, 2.0]
    # Without Triton the release is what answers are held against.
    assert record["agreement"]["with"] == "release"
    assert record["agreement"]["equal"] == 1


def test_answers_that_repeat_a_token_are_not_compared() -> None:
    def compared(*answers: list[list[int]]) -> bool:
        engines: Any = {"release": FakeEngine(*answers)}
        options = ["--batch-size", "2"]
        [record] = bench_engine.serve(engines, "a", "latency", options, 3, 0.0)
        return "agreement" in record

    other = [[1, 2, 3]] * 3
    assert not compared([[1, 1, 1], [2, 2, 2], [3, 4, 5]], other)
    # One of two can do that, and one token alone does not repeat.
    assert compared([[1, 1, 1], [2, 2, 1], [3]], [[1, 2, 3], [1, 2, 3], [3]])


def test_nats() -> None:
    ours, theirs = {"5": -1.0, "6": -2.0, "7": -3.0}, {"6": -2.5, "7": -3.1, "8": 0.0}
    assert bench_engine.nats([ours, ours], [theirs, ours]) == 0.5
    assert bench_engine.nats([{"5": -1.0}], [{"6": -1.0}]) is None


def test_agreement_is_of_the_same_requests() -> None:
    for found in ([], [[1]], [[1], [2, 3]]):
        with pytest.raises(RuntimeError, match="unlike numbers of tokens"):
            bench_engine.agreement(found, [[1], [2]] if found else [])


@pytest.mark.parametrize(("least", "seconds", "turns"), [(2, 0, 2), (2, 60, 5)])
def test_turns(least: int, seconds: float, turns: int) -> None:
    order: list[str] = []

    def note(name: str) -> str:
        order.append(name)
        return name

    calls = {name: functools.partial(note, name) for name in "abc"}
    found = worker.by_turns(calls, least, 5, seconds)
    assert "".join(order) == "abccbabcaacbcab"[: 3 * turns]
    assert found == {name: [name] * turns for name in "abc"}


def test_turns_without_a_limit() -> None:
    assert worker.by_turns({"a": lambda: 1}, 3) == {"a": [1, 1, 1]}
    assert worker.by_turns({}, 3) == {}


def test_what_workloads_ask_for() -> None:
    found = {
        name: bench_engine.demand(options)
        for name, (_, options) in bench_engine.workloads(1).items()
    }
    assert found["1,024 in, 1,024 out"] == (32, 1024, 1024)
    assert found["128 in, 128 out, 8 at once"] == (8, 128, 128)
    assert found["chat, 4 images"] == (16, 256 + 4 * 282, 64)
    assert found["chat, 1 video"] == (16, 256 + 16 * 80, 64)


def test_all_requests_have_room_in_the_cache() -> None:
    # 32 requests of 2,048 tokens: ten layers of 16 heads of 256 that keep the last
    # 1,024, and two of four heads of 512, keys and values in bfloat16.
    least = 32 * (10 * 1024 * 4 * 16 * 256 + 2 * 2048 * 4 * 4 * 512)
    assert least < bench_engine.kv_gib("31b", 12) * 2**30 < 1.5 * least
    # A step and the longest context need other sizes.
    assert bench_engine.kv_gib("26b", 30, "step") * 2**30 > 5 * 131072 * 4 * 2 * 512


@pytest.mark.parametrize("kind", real_gemma4.TEXTS)
def test_layers_that_fit(kind: str) -> None:
    whole = real_gemma4.TEXTS[kind]["num_hidden_layers"]
    assert bench_engine.fitting(kind, whole, 1, 1000) == whole
    few = bench_engine.fitting(kind, whole, 3, 80)
    assert few == whole or few % real_gemma4.period(kind) == 0
    with pytest.raises(RuntimeError, match="ask for fewer --forms"):
        bench_engine.fitting(kind, whole, 4, 1)
    # It is about as large as its name, and has an output layer of its own.
    sizes = {"e2b": 10.2, "e4b": 16, "12b": 24, "26b": 52, "31b": 62}
    head = 2 * 262144 * real_gemma4.TEXTS[kind]["hidden_size"] / 1e9
    found = real_gemma4.gigabytes(kind, whole) - head
    assert found == pytest.approx(sizes[kind], rel=0.1)


@pytest.mark.parametrize("kind", real_gemma4.TEXTS)
def test_checkpoint(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    text = real_gemma4.text(kind)
    real_gemma4.write(tmp_path, kind, text, real_gemma4.TOWERS[kind])
    config = AutoConfig.from_pretrained(tmp_path)
    sliding = config.text_config.per_layer_config[0]
    for name, value in real_gemma4.TEXTS[kind].items():
        if not name.startswith(("global", "num_global")):
            assert getattr(sliding, name) == value, name
    last = config.text_config.per_layer_config[text["num_hidden_layers"] - 1]
    assert last.head_dim == 512
    wanted = real_gemma4.TEXTS[kind]["num_global_key_value_heads"]
    assert last.num_key_value_heads == (wanted or sliding.num_key_value_heads)
    for name, value in real_gemma4.TOWERS[kind].items():
        assert getattr(config.vision_config, name) == value
    types = config.text_config.layer_types
    assert len(types) == text["num_hidden_layers"]
    assert types[-1] == "full_attention"
    assert types.count("full_attention") == len(types) // real_gemma4.period(kind)
    images = None if kind.startswith("e") else "vision"
    assert config.text_config.use_bidirectional_attention == images
    # vLLM copies this one to the text's.
    assert not config.tie_word_embeddings
    assert not config.text_config.tie_word_embeddings
    unified = config.architectures == ["Gemma4UnifiedForConditionalGeneration"]
    assert unified == (kind == "12b")


def test_requests_have_the_tokens() -> None:
    image = 7
    made = bench_engine._request(1000, 3, image, seed=2)
    ids = made["prompt_token_ids"]
    assert ids.count(image) == 3
    assert len(ids) + 3 * (bench_engine.SOFT_TOKENS + 1) == 1000
    assert len(made["multi_modal_data"]["image"]) == 3
    assert image not in (ids[0], ids[-1])
    # What is answered attends to the last one, whatever the window.
    long = bench_engine._request(9000, 1, image, seed=2)["prompt_token_ids"]
    assert len(long) - long.index(image) == 65
    assert "multi_modal_data" not in bench_engine._request(1000, 0, image, seed=2)


@pytest.mark.parametrize(("key", "frames"), [("", 1), ("_videos", 2)])
def test_features_are_of_the_pixels(key: str, frames: int) -> None:
    torch.manual_seed(0)
    pixels = torch.rand(3 * frames, 20, 12)
    features = [torch.empty(rows, 8) for rows in (5, 5, 7)]

    def made(order: list[int]) -> list[torch.Tensor]:
        # A batch is one tensor where all are of one size.
        parts = [pixels[i * frames : (i + 1) * frames] for i in order]
        return real_gemma4.varied(
            [features[i] for i in order], {f"pixel_values{key}": torch.cat(parts)}
        )

    found = made([0, 1, 2])
    assert [item.shape for item in found] == [item.shape for item in features]
    for order in ([2, 0, 1], [1]):
        for i, item in zip(order, made(order), strict=True):
            torch.testing.assert_close(item, found[i], rtol=0, atol=0)
    assert not (found[0] == found[1]).any()
    with pytest.raises(RuntimeError, match="2 videos have 3 frames"):
        real_gemma4.varied(features[:2], {f"pixel_values{key}": pixels[:3]})


@pytest.mark.slow
def test_both_trees_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It sets them where they are not: not for other tests.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    out = tmp_path / "out.jsonl"
    given = ["--kind", "e2b", "--layers", "1", "--repeat", "2", "--json", str(out)]
    assert bench_engine.main(["step", *given]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["tree"] for record in records} == {"release", "patched"}
    assert len(records) == 8
    assert all(record["median"] > 0 for record in records)
    for record in records:
        if record["variant"] in ("text", "images"):
            same = record["agreement"]
            assert (same["with"], same["requests"]) == ("release", 1)
            is_control = (record["tree"], record["variant"]) == ("release", "images")
            assert ("causal" in same) == is_control
