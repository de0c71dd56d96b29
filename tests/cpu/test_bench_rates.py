# SPDX-License-Identifier: Apache-2.0
"""The benchmark of rising rates: its load, its servers, and when one is saturated."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from scripts import bench_engine, bench_rates, real_gemma4, unpatched
from scripts.bench_rates import ClientIsLateError, Load, Server

ROOT = Path(__file__).resolve().parents[2]


def client_arguments(load: Load, rate: float = 2.0) -> Any:
    from vllm.benchmarks import serve

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    return parser.parse_args(load.options(5, rate, 7))


@pytest.mark.parametrize("name", bench_rates.WORKLOADS)
def test_load_is_options_of_vllm(name: str) -> None:
    from vllm.benchmarks.datasets import RandomMultiModalDataset

    load = bench_rates.WORKLOADS[name]
    args = client_arguments(load)
    assert (args.num_prompts, args.request_rate, args.seed) == (5, 2.0, 7)
    assert (args.random_input_len, args.random_output_len) == (256, 64)
    assert args.temperature == 0 and args.ignore_eos and args.save_detailed
    found = RandomMultiModalDataset(random_seed=0).get_mm_item_sampling_params(
        args.random_mm_base_items_per_request,
        args.random_mm_num_mm_items_range_ratio,
        args.random_mm_limit_mm_per_prompt,
        args.random_mm_bucket_config,
    )
    assert found[:2] == (load.fewest, load.most)
    assert found[3] == {(*bench_engine.IMAGE, 1): 1.0}
    assert client_arguments(load, math.inf).request_rate == math.inf


def test_text_has_the_tokens_that_were_asked_for(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer
    from vllm.benchmarks.datasets import get_samples
    from vllm.tokenizers import get_tokenizer

    client = get_tokenizer(str(real_gemma4.write_tokenizer(tmp_path / "client")))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("26b"))
    load = bench_rates.WORKLOADS["chat, 1 to 4 images"]
    samples = get_samples(client_arguments(load), client)

    def tokens(text: str) -> int:
        message = {"role": "user", "content": text}
        options = {"add_generation_prompt": True, "return_dict": False}
        return len(tokenizer.apply_chat_template([message], **options))

    assert [tokens(s.prompt) - tokens("") for s in samples] == [256] * len(samples)
    # Else images could not be counted by a prompt's tokens.
    assert tokens(samples[0].prompt) < bench_rates.IMAGE_TOKENS
    assert len({s.prompt for s in samples}) == len(samples)
    images = [item["image_url"]["url"] for s in samples for item in s.multi_modal_data]
    assert len(set(images)) == len(images) > len(samples)


@pytest.mark.parametrize("cuda", [False, True])
def test_server_options_are_options_of_vllm(
    cuda: bool, checkpoint: Callable[[str], Path]
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.gpu_worker import Worker

    path = str(checkpoint("26b"))
    options = bench_rates.server_options(path, 2, cuda, 8)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    assert args.api_server_count == 2
    args.model = args.model_tag  # as ``vllm serve`` does
    engine = AsyncEngineArgs.from_cli_args(args)
    assert args.model_tag == path and engine.load_format == "dummy"
    assert engine.limit_mm_per_prompt["image"] == bench_rates.MOST_IMAGES
    assert engine.enable_prefix_caching is False
    assert engine.kv_cache_memory_bytes == (8 << 30 if cuda else None)
    assert engine.max_num_seqs == (bench_rates.MOST_AT_ONCE if cuda else None)
    if cuda:
        sizes = engine.compilation_config.cudagraph_capture_sizes
        assert (sizes[0], sizes[-1]) == (1, engine.max_num_seqs)
    extension = resolve_obj_by_qualname(engine.worker_extension_cls)
    assert extension is bench_rates.Extension
    # vLLM refuses one that has names of the worker's.
    names = [name for name in dir(extension) if not name.startswith("__")]
    assert names == ["prepare_for_rates"] and not hasattr(Worker, names[0])


def queue(
    requests: int, rate: float, seed: int, capacity: float, least: float = 0.2
) -> dict[str, Any]:
    """What a client sees of a server that answers one after the other, in order."""
    waits = np.random.default_rng(seed).exponential(1.0, requests).cumsum()
    starts = waits * (requests / rate / waits[-1])
    ends = np.empty(requests)
    free = 0.0
    for i, start in enumerate(starts):
        free = ends[i] = max(start, free) + 1 / capacity
    latencies = ends - starts + least
    duration = float(ends[-1] + least)
    found: dict[str, Any] = dict.fromkeys(bench_rates._COPIED, 0.0)
    return found | {
        "completed": requests,
        "failed": 0,
        "duration": duration,
        "request_throughput": requests / duration,
        "median_ttft_ms": 1e3 * float(np.median(latencies)),
        "start_times": starts.tolist(),
        "latencies": latencies.tolist(),
        "ttfts": latencies.tolist(),
        "input_lens": [290, 290 + 3 * 282] * (requests // 2) + [290] * (requests % 2),
        "output_lens": [64] * requests,
        "errors": [""] * requests,
    }


@pytest.mark.parametrize("requests", [16, 60, 300])
def test_pace_of_a_server_that_keeps_up(requests: int) -> None:
    rate = requests / 15
    for seed in range(20):
        found = queue(requests, rate, seed, 2 * rate, least=4.0)
        pace = bench_rates.pace(found["start_times"], found["latencies"])
        assert pace >= bench_rates.KEEPS_UP
        # What the run's own throughput does not say.
        assert found["request_throughput"] < 0.9 * rate


@pytest.mark.parametrize("share", [0.8, 0.5, 0.1])
def test_pace_is_the_share_that_is_answered(share: float) -> None:
    for seed in range(20):
        found = queue(300, 20.0, seed, 20.0 * share)
        order = np.random.default_rng(seed).permutation(300)
        mixed = [
            np.array(found[name])[order].tolist()
            for name in ("start_times", "latencies")
        ]
        assert bench_rates.pace(*mixed) == pytest.approx(share, rel=0.15)


def test_pace_while_a_server_fills() -> None:
    starts = np.arange(60) / 4
    latencies = 0.5 + np.minimum(starts, 2.0)
    pace = bench_rates.pace(starts.tolist(), latencies.tolist())
    assert bench_rates.KEEPS_UP < pace < 1.0
    # None comes early enough to tell.
    assert bench_rates.pace([0, 1, 2], [3, 3, 3]) == 1.0


def test_pace_of_a_batch_that_ends_at_once() -> None:
    starts = np.linspace(0, 10, 100)
    latencies = np.maximum(14 + starts / 10 - starts, 0.3)
    # The late ones took least.
    latencies[:5] = 0.3
    assert bench_rates.pace(starts.tolist(), latencies.tolist()) < 0.1


def test_requests_at_once_have_no_pace() -> None:
    with pytest.raises(ValueError, match="at once"):
        bench_rates.pace([1.0, 1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"pace": 0.79}, True),
        ({"median_ttft_ms": 499.0}, False),
        ({"median_ttft_ms": 501.0}, True),
        ({"failed": 1}, True),
    ],
)
def test_saturated(changes: dict[str, Any], expected: bool) -> None:
    record = {"pace": 0.81, "median_ttft_ms": 100.0, "failed": 0} | changes
    assert bench_rates.saturated(record, 100.0) is expected


def rising(
    capacities: dict[str, float], rates: list[float] | None = None, late: float = 1e9
) -> tuple[list[dict[str, Any]], list[tuple[str, int, float, int]]]:
    """Measure queues in the place of servers; return records and what was run."""
    runs = []

    def run(server: Any, count: int, rate: float, seed: int) -> dict[str, Any]:
        if late <= rate < math.inf:
            raise ClientIsLateError("late")
        runs.append((server.name, count, rate, seed))
        return queue(count, rate, seed, capacities[server.name])

    asked: list[Any] = [SimpleNamespace(name=n, attention=["A"]) for n in capacities]
    records = bench_rates.measure(
        asked, rates, 1.0, lambda rate: max(16, math.ceil(rate * 20)), run
    )
    return list(records), runs


def test_rates_rise_until_all_are_saturated() -> None:
    records, runs = rising({"slow": 3.0, "fast": 10.0})
    assert [(r["tree"], r["rate"]) for r in records] == [
        *(("slow", 1.0), ("fast", 1.0), ("fast", 2.0), ("slow", 2.0)),
        *(("slow", 4.0), ("fast", 4.0)),
        # What is saturated is not asked for more.
        *(("fast", 8.0), ("fast", 16.0)),
        *(("fast", None), ("slow", None)),
    ]
    saturated = {(r["tree"], r["rate"]) for r in records if r.get("saturated")}
    assert saturated == {("slow", 4.0), ("fast", 16.0)}
    # The same requests of both, never the same twice.
    of_rate: dict[float, set[tuple[int, int]]] = {}
    for _, count, rate, seed in runs:
        of_rate.setdefault(rate, set()).add((count, seed))
    assert all(len(asked) == 1 for asked in of_rate.values())
    [counts, seeds] = zip(*(asked.pop() for asked in of_rate.values()), strict=True)
    assert len(set(seeds)) == len(seeds)
    assert counts[:-1] == (20, 40, 80, 160, 320)
    # All at once: what the slow one answers in the time.
    assert 50 <= counts[-1] <= 60
    assert "saturated" not in records[-1] and "pace" not in records[-1]
    assert all(len(r["ttfts"]) == r["completed"] for r in records)


def test_one_limit_of_waiting_for_all() -> None:
    medians = {1.0: (100.0, 10.0), 2.0: (400.0, 400.0), 4.0: (600.0, 600.0)}

    def run(server: Any, count: int, rate: float, seed: int) -> dict[str, Any]:
        waits = medians[rate][server.name == "fast"]
        return queue(count, rate, seed, 100.0) | {"median_ttft_ms": waits}

    asked: list[Any] = [SimpleNamespace(name=n, attention=[]) for n in ("slow", "fast")]
    found = bench_rates.measure(asked, list(medians), 1.0, lambda _: 20, run)
    assert [r["saturated"] for r in found] == [False] * 4 + [True] * 2


def test_a_late_client_ends_the_rising() -> None:
    records, _ = rising({"slow": 3.0, "fast": 10.0}, late=4.0)
    assert [r["rate"] for r in records[::2]] == [1.0, 2.0, None]
    with pytest.raises(ClientIsLateError):
        rising({"slow": 3.0}, [1.0, 4.0], late=4.0)


def test_given_rates_are_all_offered() -> None:
    records, _ = rising({"slow": 3.0}, [8.0, 2.0, math.inf])
    assert [r["rate"] for r in records] == [8.0, 2.0, None]


def test_failed_requests_are_left_out() -> None:
    found = queue(20, 2.0, 0, 10.0)
    found |= {"completed": 19, "failed": 1}
    found["output_lens"][3], found["ttfts"][3], found["latencies"][3] = 0, 0.0, 0.0
    bench_rates.check(found, Load(1, 4), 20, 2.0)
    record = bench_rates.summary(found, 2.0)
    assert len(record["ttfts"]) == 19 and min(record["ttfts"]) > 0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"completed": 15}, "15 of 16"),
        ({"output_lens": [63] + [64] * 15}, "64 tokens"),
        ({"output_lens": [0] + [64] * 15}, "64 tokens"),
        ({"input_lens": [281] + [290] * 15}, "0 to 1 images"),
        ({"input_lens": [5 * 282] + [290] * 15}, "1 to 5 images"),
        ({"start_times": [0.0] * 15 + [8.5]}, "0.5 s late"),
    ],
)
def test_check_refuses(changes: dict[str, Any], error: str) -> None:
    load, found = Load(1, 4), queue(16, 2.0, 0, 10.0)
    bench_rates.check(found, load, 16, 2.0)
    with pytest.raises(RuntimeError, match=error):
        bench_rates.check(found | changes, load, 16, 2.0)


# In the place of ``vllm serve``: what it answers, and processes of its own.
FAKE = """
import http.server, json, os, subprocess, sys
about, said = json.loads({about!r}), {said!r}
port = int(sys.argv[sys.argv.index("--port") + 1])
print("vLLM from", about["tree"] + "/vllm/entrypoints/cli/main.py", flush=True)
if said and not os.path.exists({marker!r}):
    open({marker!r}, "w").close()
    raise SystemExit(said)
child = subprocess.Popen(["sleep", "600"])
open({pids!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.end_headers()
        text = json.dumps(
            {{"results": [about], "choices": [{{"token_ids": [1, 2]}}]}}
        )
        if self.path == "/metrics":
            text = 'vllm:mm_cache_hits_total{{engine="0"}} 2.0\\n'
            text += 'vllm:prefix_cache_hits_total{{engine="0"}} 1.0\\n'
        self.wfile.write(text.encode())
    do_POST = do_GET
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
ABOUT = {"tree": str(ROOT), "patched": True, "attention": ["window 1: CPU_ATTN"]}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Server]:
    """Make a server whose program is ``FAKE``, with changes to what that says."""
    release = tmp_path / "release"
    release.mkdir()
    monkeypatch.setattr(unpatched, "unpatched_tree", lambda: release)

    def make(name: str, said: str = "", **changes: Any) -> Server:
        about = ABOUT | {"patched": name == "patched"}
        if name != "patched":
            about["tree"] = str(release)
        code = FAKE.format(
            about=json.dumps(about | changes),
            said=said,
            marker=str(tmp_path / "marker"),
            pids=str(tmp_path / "pids"),
        )
        monkeypatch.setattr(bench_rates, "_SERVE", code)
        return Server(name, tmp_path)

    return make


def is_gone(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def assert_gone(pids: list[str]) -> None:
    end = time.monotonic() + 20
    while not all(map(is_gone, pids)):
        assert time.monotonic() < end, f"{pids} are still there"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["release", "patched"])
def test_server_is_asked_and_ended(
    name: str, fake: Callable[..., Server], tmp_path: Path
) -> None:
    server = fake(name)
    try:
        server.start([])
        assert server.attention == ABOUT["attention"]
        assert server.hits() == 3.0
        same = bench_rates.same_answers([server], Load(1, 2, 8, 2))
        counts = {"requests": 8, "first": 8, "tokens": 16, "equal": 16}
        assert same == {name: counts | {"with": name}}
        # Its own images are those that it was asked twice.
        assert server.hits() == 0.0
        pids = (tmp_path / "pids").read_text().split()
        assert len(pids) == 2 and not any(map(is_gone, pids))
    finally:
        server.stop()
    assert not server.is_alive()
    assert_gone(pids)


def test_server_ends_with_this_process(
    fake: Callable[..., Server], tmp_path: Path
) -> None:
    server = fake("patched")
    try:
        server.start([])
        pids = (tmp_path / "pids").read_text().split()
        assert server.process is not None and server.process.stdin is not None
        # As the system does, whatever ended it.
        server.process.stdin.close()
        assert_gone(pids)
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("patched", {"patched": False}, "not the tree of the patched"),
        ("release", {"patched": True}, "not the tree of the release"),
        ("release", {"tree": str(ROOT)}, "not the tree of the release"),
        ("triton", {}, "triton has attention"),
        ("patched", {"attention": []}, "patched has attention"),
    ],
)
def test_wrong_server_is_refused(
    name: str, changes: dict[str, Any], error: str, fake: Callable[..., Server]
) -> None:
    server = fake(name, **changes)
    try:
        with pytest.raises(RuntimeError, match=error):
            server.start([])
    finally:
        server.stop()


def test_server_process_of_another_tree_is_refused(
    fake: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake("patched")
    code = bench_rates._SERVE.replace('"vLLM from", about["tree"]', '"vLLM from /x"')
    monkeypatch.setattr(bench_rates, "_SERVE", code)
    try:
        with pytest.raises(RuntimeError, match="not the tree of the patched"):
            server.start([])
    finally:
        server.stop()


def test_taken_port_is_no_failure(fake: Callable[..., Server]) -> None:
    server = fake("patched", said="OSError: [Errno 98] address already in use")
    try:
        server.start([])
        assert server.attention
    finally:
        server.stop()


def test_dead_server_shows_its_log(
    fake: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake("patched", said="no such thing")
    with pytest.raises(RuntimeError, match="the patched server ended"):
        server.start([])
    server.stop()
    assert "no such thing" in capsys.readouterr().err


@pytest.mark.slow
def test_server_of_the_release(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
    out, model = tmp_path / "out.jsonl", checkpoint("26b")
    given = ["--checkpoint", str(model), "--forms", "release", "--rates", "1,inf"]
    process = subprocess.run(
        [sys.executable, "-m", "scripts.bench_rates", *given, "--json", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["rate"] for record in records] == [1.0, None]
    for record in records:
        assert record["kind"] == model.name and record["layers"] == 6
        assert record["tree"] == "release" and record["attention"]
        assert record["workload"] == "chat, 1 to 4 images"
        assert record["failed"] == 0 and record["completed"] == len(record["ttfts"])
        assert all(0 < ttft < record["seconds"] for ttft in record["ttfts"])
        tokens = record["output_throughput"] / record["request_throughput"]
        assert tokens == pytest.approx(4)
        assert set(record) >= {f"p99_{name}_ms" for name in ("ttft", "tpot", "e2el")}
        assert len(record["latencies"]) == len(record["starts"]) == record["completed"]
        same = record["agreement"]
        assert (same["with"], same["requests"], same["tokens"]) == ("release", 8, 32)
        assert same["equal"] == 32
