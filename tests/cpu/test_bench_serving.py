# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark: what it asks of vLLM is what vLLM's benchmarks take."""

import importlib

import pytest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from scripts import bench_serving


@pytest.mark.parametrize("shrink", [1, 64, 100_000])
@pytest.mark.parametrize("name", bench_serving.workloads(1))
def test_workloads_are_options_of_vllm(name: str, shrink: int) -> None:
    bench, options = bench_serving.workloads(shrink)[name]
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
    assert lengths[0] + lengths[1] <= bench_serving.MAX_MODEL_LEN
    if "chat" in name:
        images = args.random_mm_limit_mm_per_prompt["image"]
        assert args.random_mm_bucket_config == {(*bench_serving.IMAGE, 1): 1.0}
        assert args.random_mm_base_items_per_request == images


class FakeEngine:
    """Answers like an engine: the first time is slow."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __call__(
        self, method: str, bench: str, options: list[str], seed: int
    ) -> dict[str, float]:
        self.seeds.append(seed)
        return {"seconds": 100.0 if seed == 0 else float(seed)}


def test_measure_leaves_the_warm_up_out() -> None:
    engines = {"release": FakeEngine(), "patched": FakeEngine()}
    records = bench_serving.measure(engines, "latency", [], 3)  # type: ignore[arg-type]
    assert [record["tree"] for record in records] == ["release", "patched"]
    for record in records:
        assert record["samples"] == {"seconds": [1.0, 2.0, 3.0]}
        assert record["median"] == 2.0
    # No prompt is seen twice.
    assert all(engine.seeds == [0, 1, 2, 3] for engine in engines.values())
