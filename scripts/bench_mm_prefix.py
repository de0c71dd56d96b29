# SPDX-License-Identifier: Apache-2.0
"""Time bidirectional image attention (mm_prefix): a layer, or the host alone.

``layer`` runs the prefill of one attention layer in every form, by turns in one
process: plain causal attention as the floor, the patched FlashAttention backend, and
what the release has. ``builder`` times the host's part of a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from scripts import demo, real_gemma4, unpatched, worker
from scripts.real_gemma4 import WINDOW

DTYPE = torch.bfloat16
FLASH_ATTN = "vllm.v1.attention.backends.flash_attn"
# GPU cycles, about a millisecond: a call's kernels are queued before the first starts.
HEAD_START = 2_000_000
GRAPH_CALLS = 10
FORMS = ("correction", "split", "one_call")  # of the patched backend


@dataclasses.dataclass
class Request:
    """A row of a batch: its queries are the last of its keys.

    ``ranges`` are the prompt positions of images, first and last.
    """

    query_len: int
    kv_len: int
    ranges: Sequence[tuple[int, int]] = ()


@dataclasses.dataclass
class Case:
    """A batch and the layer that it goes through; without ``window`` it sees all."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    window: int | None
    requests: Sequence[Request]


def spread(images: int, size: int, length: int) -> Request:
    """A prompt of ``length`` tokens with images of ``size`` evenly spread in it."""
    gap = (length - images * size) // images
    starts = [gap // 2 + i * (gap + size) for i in range(images)]
    return Request(length, length, [(start, start + size - 1) for start in starts])


def cases() -> dict[str, Case]:
    """The cases of ``layer`` by letter."""
    large, small = (32, 16, 256, WINDOW), (16, 8, 256, WINDOW)
    decodes = [Request(1, 8000)] * 64
    decode, chat = Request(1, 100000), spread(1, 280, 300)
    found = [
        Case("A 1x16384, 4 images", *large, [spread(4, 280, 16384)]),
        Case("B 8x2000, 7 images each", *large, [spread(7, 280, 2000)] * 8),
        Case("C 64 decodes, 1 image", *large, [*decodes, chat]),
        Case("D 2x8192, 8 of 256 each", 32, 16, 128, None, [spread(8, 256, 8192)] * 2),
        Case("E 1x300, 1 image", *large, [chat]),
        Case("F 1x1300, 1 of 1120", *large, [spread(1, 1120, 1300)]),
        Case("G 8x1900, 3 images each", *small, [spread(3, 280, 1900)] * 8),
        Case("H 8x1900, 3 images each", *large, [spread(3, 280, 1900)] * 8),
        Case("V 32 video frames of 70", *large, [spread(32, 70, 32 * 76)]),
        Case("S 64 images of 16", *large, [spread(64, 16, 64 * 18)]),
        Case("I 1x8192, image first", *large, [Request(8192, 8192, [(10, 289)])]),
        Case("T 15900 of text, 1 image", *large, [Request(15900, 15900), chat]),
        Case("L decode at 100000, 1 image", 32, 16, 128, None, [decode, chat]),
    ]
    return {case.name[0]: case for case in found}


def causal_cases() -> list[Case]:
    """Batches without images for ``layer --decode``."""
    found = []
    for heads, kv_heads in ((32, 16), (16, 8)):
        shape = (heads, kv_heads, 256, WINDOW)
        for count, keys in ((1, 8000), (8, 8000), (64, 8000), (256, 2000)):
            name = f"{heads}/{kv_heads} decode {count} at {keys}"
            found.append(Case(name, *shape, [Request(1, keys)] * count))
        for count, keys in ((1, 512), (1, 2048), (8, 2000), (1, 16384)):
            name = f"{heads}/{kv_heads} prefill {count}x{keys}"
            found.append(Case(name, *shape, [Request(keys, keys)] * count))
    return found


@functools.cache
def layer_config(sizes: tuple[int, ...], page: int, eager: bool) -> Any:
    """The ``VllmConfig`` of a model; sizes are heads, KV heads and head size."""
    from vllm.engine.arg_utils import EngineArgs

    heads, kv_heads, head_size = sizes
    text = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_global_key_value_heads": kv_heads,
        "head_dim": head_size,
        "global_head_dim": head_size,
        "sliding_window": WINDOW,
    }
    with tempfile.TemporaryDirectory() as path, demo.quiet():
        return EngineArgs(
            model=real_gemma4.write(path, "31b", text),
            dtype="bfloat16",
            block_size=page,
            max_model_len=16384,
            max_num_batched_tokens=32768,
            max_num_seqs=1024,
            enforce_eager=eager,
        ).create_engine_config()


def unpatched_module(name: str) -> Any:
    """Load a module of the release, by another name, into the patched tree."""
    file = unpatched.unpatched_tree() / (name.replace(".", "/") + ".py")
    alias = "unpatched_" + name.replace(".", "_")
    spec = importlib.util.spec_from_file_location(alias, file)
    assert spec is not None and spec.loader is not None
    sys.modules[alias] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def unpatched_flash_attn() -> Any:
    """The release's FlashAttention backend, with the helper that the patches remove."""
    name = "vllm.v1.attention.backends.utils"
    helper = unpatched_module(name).fill_mm_prefix_query_ranges
    utils = importlib.import_module(name)
    with mock.patch.object(utils, helper.__name__, helper, create=True):
        return unpatched_module(FLASH_ATTN)


_layer_names = map("layers.{}.attn".format, itertools.count())


class Batch:
    """The tensors of a case; queries and the KV cache are made when they are used."""

    def __init__(self, case: Case, args: argparse.Namespace) -> None:
        self.case, self.page, self.device = case, args.page, args.device
        sizes = (case.heads, case.kv_heads, case.head_size)
        self.config = layer_config(sizes, args.page, args.eager)
        lengths = [request.query_len for request in case.requests]
        self.kv_lens = [request.kv_len for request in case.requests]
        self.starts = [0, *itertools.accumulate(lengths)]
        self.tokens = self.starts[-1]
        self.checked = [0, case.heads // 2, case.heads - 1]
        pages = [-(-kv_len // self.page) for kv_len in self.kv_lens]
        self.num_pages = sum(pages)
        # In no order, as a server that has run for a while has them.
        rows = list(torch.randperm(self.num_pages).int().split(pages))
        self.block_table = torch.nn.utils.rnn.pad_sequence(rows, True).to(self.device)
        self.in_range = torch.zeros(self.tokens, dtype=torch.bool)
        for start, request in zip(self.starts, case.requests, strict=False):
            offset = start - (request.kv_len - request.query_len)
            for first, last in request.ranges:
                stop = max(last + offset + 1, start)
                self.in_range[max(first + offset, start) : stop] = True

    def common(self, ranges: Any) -> Any:
        """What a model runner gives to metadata builders for this batch."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        starts = torch.tensor(self.starts, dtype=torch.int32)
        kv_lens = torch.tensor(self.kv_lens, dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=kv_lens.to(self.device),
            seq_lens_cpu_upper_bound=kv_lens,
            num_reqs=len(self.kv_lens),
            num_actual_tokens=self.tokens,
            max_query_len=max(request.query_len for request in self.case.requests),
            max_seq_len=max(self.kv_lens),
            block_table_tensor=self.block_table,
            slot_mapping=torch.arange(self.tokens, device=self.device),
            mm_req_doc_ranges=ranges,
        )

    def layer(self, backend: Any, version: int | None) -> tuple[Any, Any]:
        """An attention layer of ``backend`` and its metadata builder.

        Raises:
            RuntimeError: That version of FlashAttention does not run here.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.attention import Attention
        from vllm.utils.torch_utils import set_default_torch_dtype

        case, name = self.case, next(_layer_names)
        self.config.attention_config.flash_attn_version = version
        with set_current_vllm_config(self.config), set_default_torch_dtype(DTYPE):
            layer = Attention(
                case.heads,
                case.head_size,
                case.head_size**-0.5,
                num_kv_heads=case.kv_heads,
                cache_config=self.config.cache_config,
                per_layer_sliding_window=case.window,
                prefix=name,
                attn_backend=backend,
                mm_prefix_clamp_sliding_window=case.window is not None,
            ).to(self.device)
            if getattr(layer.impl, "vllm_flash_attn_version", None) != version:
                raise RuntimeError(f"FlashAttention {version} is not available here")
            given = ([name], self.config, torch.device(self.device))
            spec = layer.get_kv_cache_spec(self.config)
            assert spec.block_size == self.page
            return layer, backend.get_builder_cls()(spec, *given)

    def forward(
        self, backend: Any, version: int | None, form: str
    ) -> tuple[Callable[[], Any], str]:
        """A layer's forward on this batch, and the form that the patched one takes.

        ``form`` is ``floor`` without images, one of ``FORMS`` to force the patched
        backend, ``chosen`` for its own estimate, or a name of no meaning.
        """
        layer, builder = self.layer(backend, version)
        if form == "one_call" and not builder.mm_prefix_one_call:
            raise RuntimeError("one call takes FA4 on Hopper and a window")
        if form in FORMS:
            forced = importlib.import_module(FLASH_ATTN).MMPrefixForm[form.upper()]
            builder._mm_prefix_form = lambda *_: forced
        rows = enumerate(self.case.requests)
        ranges = {row: list(r.ranges) for row, r in rows if r.ranges}
        metadata = builder.build(0, self.common(None if form == "floor" else ranges))
        taken = ""
        if form in (*FORMS, "chosen"):
            taken = metadata.mm_prefix.form.name.lower()
        # All keys and values are in the cache: those of a step are not read.
        unread = self.query[:, : self.case.kv_heads]
        given = (layer, self.query, unread, unread, self.kv_cache, metadata)
        return functools.partial(layer.impl.forward, *given, output=self.output), taken

    @functools.cached_property
    def query(self) -> Any:
        """[tokens, heads, head size]"""
        shape = (self.tokens, self.case.heads, self.case.head_size)
        return torch.randn(shape, dtype=DTYPE, device=self.device)

    @functools.cached_property
    def kv_cache(self) -> Any:
        """[pages, KV heads, page, 2 * head size]; all heads of a token are together."""
        shape = (self.num_pages, self.page, self.case.kv_heads, 2 * self.case.head_size)
        cache = torch.empty(shape, dtype=DTYPE, device=self.device)
        return cache.normal_().transpose(1, 2)

    @functools.cached_property
    def output(self) -> Any:
        return torch.empty_like(self.query)

    @functools.cached_property
    def reference(self) -> Any:
        """Float32 [tokens, checked heads, head size], from one dense mask.

        A query p sees the keys in (p - window, p], or up to the end of its image.
        """
        case, parts = self.case, []
        kv_heads = [head * case.kv_heads // case.heads for head in self.checked]
        for row, request in enumerate(case.requests):
            pages = self.block_table[row, : -(-request.kv_len // self.page)].long()
            cached = self.kv_cache[pages][:, kv_heads].transpose(1, 2).flatten(0, 1)
            cached = cached[: request.kv_len].float()
            keys, values = cached.split(case.head_size, -1)
            queries = self.query[self.starts[row] : self.starts[row + 1], self.checked]
            context = request.kv_len - request.query_len
            positions = torch.arange(context, request.kv_len, device=self.device)
            # In parts, as all scores of a long prompt would not fit.
            for start in range(0, request.query_len, 1024):
                query, at = (x[start : start + 1024] for x in (queries, positions))
                last = at.clone()
                for first, end in request.ranges:
                    last[(at >= first) & (at <= end)] = end
                reach = case.window or request.kv_len
                low = max(0, int(at[0]) - reach)
                key = torch.arange(low, request.kv_len, device=self.device)
                seen = (key <= last[:, None]) & (key > at[:, None] - reach)
                scores = torch.einsum("qhd,khd->hqk", query.float(), keys[low:])
                scores = (scores * case.head_size**-0.5).masked_fill(~seen, -torch.inf)
                weights = scores.softmax(-1)
                parts.append(torch.einsum("hqk,khd->qhd", weights, values[low:]))
        return torch.cat(parts)

    def errors(self) -> dict[str, float]:
        """Relative errors of ``output``: of rows in images and of the others."""
        errors = {}
        for name, rows in (("ranges", self.in_range), ("rest", ~self.in_range)):
            if rows.any():
                expected = self.reference[rows.to(self.device)]
                found = self.output[rows.to(self.device)][:, self.checked].float()
                error = (found - expected).norm() / expected.norm()
                errors[name] = float(f"{float(error):.1e}")
        return errors


def report(case: str, variant: str, samples: Any, **more: Any) -> dict[str, Any]:
    """Print median and spread of samples with what else there is; return a record."""
    low, median, high = (float(x) for x in np.percentile(samples, [10, 50, 90]))
    texts = [f"{name} {value}" for name, value in more.items() if value != ""]
    spread = f"{low:.1f} to {high:.1f}"
    line = f"  {variant:<20} {median:>10.1f}  {spread:<20} {', '.join(texts)}"
    print(line.rstrip(), flush=True)
    record = {"case": case, "variant": variant, "median": median}
    record |= {"p10_p90": [low, high], "samples": np.asarray(samples).tolist()}
    return record | more


def table(records: Sequence[Mapping[str, Any]], across: str, down: str) -> None:
    """Print all medians and their multiples of the floor."""
    cells = {
        (record[down], record[across]): f"{record['median']:.1f} x{record['x_floor']}"
        for record in records
    }
    columns = list(dict.fromkeys(record[across] for record in records))
    # Names of cases are long: their letters do.
    heads = [name.split()[0] if across == "case" else name for name in columns]
    print(f"\n{'':<26}" + "".join(f"{head:>16}" for head in heads))
    for row in dict.fromkeys(record[down] for record in records):
        texts = [cells.get((row, column), "-") for column in columns]
        print(f"{row:<26}" + "".join(f"{text:>16}" for text in texts))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _host_time(run: Callable[[], Any]) -> float:
    """Microseconds until ``run`` returns, with nothing before it in the GPU's queue."""
    _synchronize()
    begin = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - begin)


def _gpu_time(run: Callable[[], Any]) -> tuple[float, float]:
    """Microseconds on the GPU and, until all is queued, on the host."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    begin = time.perf_counter()
    run()
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end), 1e6 * host


Plan = tuple[Any, int | None, str]


def measure_layer(batch: Batch, plans: Sequence[Plan], repeat: int) -> list[Any]:
    """Check and time the forms of a batch; return their records."""
    print(f"\n{batch.case.name}: {batch.tokens} tokens, us", flush=True)
    decoding = batch.tokens == len(batch.kv_lens)
    calls = GRAPH_CALLS if decoding else 1
    runs: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    assert batch.reference is not None  # made now: no form's memory
    for backend, version, form in plans:
        name = f"FA{version} {form}" if version else f"Triton {form}"
        begin = time.perf_counter()
        try:
            run, taken = batch.forward(backend, version, form)
            batch.output.fill_(torch.nan)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            mib = (torch.cuda.max_memory_allocated() - before) / 2**20
            found[name] = {"form": taken, **batch.errors(), "mib": round(mib, 1)}
            if decoding:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(calls):
                        run()
                run = graph.replay
            runs[name] = functools.partial(_gpu_time, run)
        except Exception as failure:  # one kernel less is no reason to stop
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
            print(f"  {name:<20} skipped: {reason}", flush=True)
        if (seconds := time.perf_counter() - begin) > 5:
            print(f"  {name:<20} ready after {seconds:.0f} s", flush=True)
    worker.by_turns(runs, 3)
    records: list[Any] = []
    floors: dict[str, float] = {}
    for name, times in worker.by_turns(runs, repeat).items():
        gpu, host = np.array(times).T / calls
        median = float(np.median(gpu))
        kind, form = name.split()
        if form == "floor":
            floors[kind] = median
        x_floor = round(median / floors.get(kind, np.nan), 2)
        more = {"x_floor": x_floor, "host": round(float(np.median(host)), 1)}
        records.append(report(batch.case.name, name, gpu, **more, **found[name]))
    return records


def bench_layer(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time one layer's forms on every case, or causal attention by ``--decode``."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    patched = importlib.import_module(FLASH_ATTN).FlashAttentionBackend
    plans: list[Plan]
    if args.decode:
        chosen = causal_cases()
        plans = [(patched, version, "floor") for version in args.versions]
    else:
        chosen = args.cases
        forms = ("floor", "chosen", *FORMS)
        plans = list(itertools.product([patched], args.versions, forms))
        if 4 in args.versions:
            plans.append((unpatched_flash_attn().FlashAttentionBackend, 4, "mask_mod"))
        plans += [(TritonAttentionBackend, None, form) for form in ("floor", "ranges")]
    records: list[dict[str, Any]] = []
    for case in chosen:
        torch.manual_seed(0)
        with torch.inference_mode():
            batch = Batch(case, args)
            found = measure_layer(batch, plans, args.repeat)
        yield from found
        records += found
        batch.config.compilation_config.static_forward_context.clear()
        del batch
        torch.cuda.empty_cache()
    table(records, *(("variant", "case") if args.decode else ("case", "variant")))


def _features(requests: Sequence[Request]) -> dict[str, list[Any]]:
    """The images of each request as the scheduler describes them, by request id."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    features: dict[str, list[Any]] = {}
    for row, request in enumerate(requests):
        features[str(row)] = []
        for first, last in request.ranges:
            # Begin and end of an image are causal.
            inside = torch.ones(last - first + 3, dtype=torch.bool)
            inside[[0, -1]] = False
            at = PlaceholderRange(first - 1, len(inside), inside)
            spec = MultiModalFeatureSpec(None, "image", f"{row} {first}", at)
            features[str(row)].append(spec)
    return features


def bench_builder(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time the host's part of a step, patched and in the release."""
    from vllm.v1.attention import mm_prefix

    patched, old = importlib.import_module(FLASH_ATTN), unpatched_flash_attn()
    old_utils = unpatched_module("vllm.v1.worker.gpu.attn_utils")
    shape = (32, 16, 256, WINDOW)
    decodes = [Request(1, 1500, spread(2, 280, 1000).ranges)] * 1008
    chosen = [
        Case("256 decodes, text", *shape, [Request(1, 2000)] * 256),
        Case("1008 decodes, 16 prefills", *shape, decodes + [spread(3, 280, 900)] * 16),
    ]
    for case in chosen:
        batch = Batch(case, args)
        clamps = SimpleNamespace(mm_prefix_clamp_sliding_window=True)
        finder = mm_prefix.MMPrefixRangeFinder(batch.config.model_config, clamps)
        ids = [str(row) for row in range(len(case.requests))]
        staging = np.empty((32768, 2), np.int32)
        prefilling = np.array([request.query_len > 1 for request in case.requests])

        def find(finder: Any, ids: Any, prefilling: Any, features: Any) -> Any:
            # As the model runner does.
            rows = np.flatnonzero(prefilling).tolist()
            return finder.find((row, features.get(ids[row], ())) for row in rows)

        def find_old(ids: Any, features: Any) -> Any:
            return old_utils.compute_mm_prefix_ranges(ids, features, WINDOW)

        def first_time(find: Callable[[Any], Any], requests: Any) -> float:
            # A feature remembers its ranges, and most prompts go through once.
            return _host_time(functools.partial(find, _features(requests)))

        def build(builder: Any, common: Any) -> None:
            # A batch's other groups of layers would find the first one's segments.
            common._mm_prefix_segments_cache.clear()
            builder.build(0, common)

        run = functools.partial
        finds = {
            "find, patched": run(find, finder, ids, prefilling),
            "find, release": run(find_old, ids),
        }
        features = _features(case.requests)
        found, found_old = (call(features) for call in finds.values())
        common = batch.common(None)
        starts, lens = common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound
        cut, fill = mm_prefix.cut_into_segments, old.fill_mm_prefix_query_ranges
        runs: dict[str, Callable[[], Any]] = {
            "cut, patched": run(cut, found, starts.numpy(), lens.numpy()),
            "fill, release": run(fill, staging, found_old, starts, lens),
        }
        sides = [("patched", patched, found, args.versions)]
        # The release's has images on FA4 alone, and only where it is asked for.
        of_four = [version for version in args.versions if version == 4]
        sides.append(("release, FLASH_ATTN asked for", old, found_old, of_four))
        for name, tree, ranges, versions in sides:
            # Without a GPU nothing is built.
            for version in versions if args.device == "cuda" else ():
                _, builder = batch.layer(tree.FlashAttentionBackend, version)
                given = run(build, builder, batch.common(ranges))
                runs[f"FA{version} build, {name}"] = given
        print(f"\n{case.name}: {batch.tokens} tokens, us on the host", flush=True)
        timed = {k: run(first_time, call, case.requests) for k, call in finds.items()}
        timed |= {name: run(_host_time, call) for name, call in runs.items()}
        worker.by_turns(timed, 5)
        for name, samples in worker.by_turns(timed, args.repeat).items():
            yield report(case.name, name, samples)
        batch.config.compilation_config.static_forward_context.clear()


def _cases(text: str) -> list[Case]:
    letters, known = text.upper().split(","), cases()
    if unknown := set(letters) - set(known):
        raise argparse.ArgumentTypeError(f"no case {', '.join(sorted(unknown))}")
    return [known[letter] for letter in letters]


def _versions(text: str) -> list[int]:
    return [int(version) for version in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    """Run one level of the benchmark; return the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_mm_prefix", description=__doc__.splitlines()[0]
    )
    levels = parser.add_subparsers(dest="level", required=True)
    layer = levels.add_parser("layer", help="one layer's prefill in all its forms")
    builder = levels.add_parser("builder", help="the host's part of a step")
    benches = {layer: (bench_layer, 30), builder: (bench_builder, 50)}
    for level, (bench, repeat) in benches.items():
        level.set_defaults(bench=bench)
        level.add_argument("--json", type=Path, help="append the records to this file")
        level.add_argument("--repeat", type=int, default=repeat, help="runs of each")
    for level, versions in ((layer, "2,3,4"), (builder, "3,4")):
        level.add_argument("--page", type=int, default=16, help="tokens of a KV block")
        level.add_argument("--eager", action="store_true", help="without CUDA graphs")
        help = f"of FlashAttention (default: {versions})"
        level.add_argument("--versions", type=_versions, default=versions, help=help)
    help = "some of the cases, for example A,B"
    layer.add_argument("--cases", type=_cases, default=",".join(cases()), help=help)
    help = "causal attention only, decodes in CUDA graphs"
    layer.add_argument("--decode", action="store_true", help=help)
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    args.device = "cuda" if cuda else "cpu"
    if args.level == "layer" and not cuda:
        parser.exit(1, "bench_mm_prefix: there is no GPU to time a layer on\n")
    more = {"level": args.level, "repeat": args.repeat}
    more["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    try:
        for record in args.bench(args):
            worker.keep(args.json, more | record)
    except (OSError, RuntimeError) as error:
        print(f"bench_mm_prefix: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
