# SPDX-License-Identifier: Apache-2.0
"""Time whole engines of both trees by turns, of real widths with dummy weights.

``step`` runs one prefill step with images and without, language model and tower apart.
``scaling`` does so for longer and longer prompts, and for more and more images in one.
``serving`` runs vLLM's own benchmarks of throughput and latency, which make an engine
of their own else. All trees get the same requests; what they answer greedily is held
against the release on Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from scripts import demo, real_gemma4, worker
from scripts.worker import ROOT, Process

FORMS: dict[str, tuple[dict[str, Any], bool]] = {
    # attention's options, and whether the tree is the release's
    "release": ({}, True),
    "triton": ({"backend": "TRITON_ATTN"}, True),
    "patched": ({}, False),
    # Gemma4's config takes FA4 for all heads where there is one.
    "fa3": ({"backend": "FLASH_ATTN", "flash_attn_version": 3}, False),
}
# What greedy tokens are held against: the first that there is. With images the release
# takes Triton by itself.
REFERENCES = ("triton", "release")
LIKELY = 20  # tokens whose log probabilities are
IMAGE = (672, 960)  # height and width: 280 soft tokens, 282 with begin and end
SOFT_TOKENS = 280
VIDEO = (336, 480, 16)  # and frames: 70 soft tokens each
STEP_TOKENS = 16384
STEPS = [(1, 15900, 4), (2, 7900, 4), (8, 1900, 3)]  # requests, tokens, images of each
CONTEXTS = [1024 << i for i in range(8)]
CONTEXT_SHARE = 0.25  # of a context's tokens are of images
SHARES = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]
SHARES_CONTEXT = 15900
PICTURES = 32  # unlike ones: more than a step has
LONG = 20  # seconds of a turn of a workload, which has fewer of them then


def _random(inputs: int, outputs: int, prompts: int) -> list[str]:
    lengths = ["--random-input-len", str(inputs), "--random-output-len", str(outputs)]
    return ["--dataset-name", "random", *lengths, "--num-prompts", str(prompts)]


def _media(
    inputs: int, outputs: int, prompts: int, items: int, shape: tuple[int, int, int]
) -> list[str]:
    lengths = _random(inputs, outputs, prompts)[2:]
    is_video = shape[2] > 1
    limits = {"image": 0 if is_video else items, "video": items if is_video else 0}
    return [
        # Without a path, which it does not read, vLLM would take "random".
        *("--backend", "vllm-chat", "--dataset-name", "random-mm", *lengths),
        *("--dataset-path", "none"),
        *("--random-mm-base-items-per-request", str(items)),
        *("--random-mm-bucket-config", str({shape: 1.0})),
        *("--random-mm-limit-mm-per-prompt", json.dumps(limits)),
    ]


def _batch(inputs: int, outputs: int, rows: int) -> list[str]:
    lengths = ["--input-len", str(inputs), "--output-len", str(outputs)]
    # The first turn is a warm-up already.
    few = ["--num-iters", "2", "--num-iters-warmup", "0"]
    return [*lengths, "--batch-size", str(rows), *few]


def workloads(shrink: int) -> dict[str, tuple[str, list[str]]]:
    """The benchmark and its options by workload.

    Args:
        shrink: What lengths and numbers of prompts are divided by.
    """

    def less(count: int) -> int:
        return max(count // shrink, 1)

    def throughput(inputs: int, outputs: int, prompts: int) -> tuple[str, list[str]]:
        lengths = less(inputs), less(outputs), less(prompts)
        return "throughput", _random(*lengths)

    def latency(inputs: int, outputs: int, rows: int) -> tuple[str, list[str]]:
        return "latency", _batch(less(inputs), less(outputs), rows)

    def media(prompts: int, each: int, *shape: int) -> tuple[str, list[str]]:
        height, width, frames = shape
        lengths = less(256), less(64), less(prompts)
        return "throughput", _media(*lengths, each, (height, width, frames))

    return {
        "4,096 in, 16 out": throughput(4096, 16, 16),
        "8,192 in, 128 out": throughput(8192, 128, 8),
        "15,872 in, 128 out": throughput(15872, 128, 4),
        "1,024 in, 1,024 out": throughput(1024, 1024, 32),
        "256 in, 256 out": throughput(256, 256, 64),
        "chat, 1 image": media(32, 1, *IMAGE, 1),
        "chat, 4 images": media(16, 4, *IMAGE, 1),
        "chat, 1 video": media(16, 1, *VIDEO),
        "first token of 4,096": latency(4096, 1, 1),
        "8,192 in, 128 out, alone": latency(8192, 128, 1),
        "128 in, 128 out, alone": latency(128, 128, 1),
        "128 in, 128 out, 8 at once": latency(128, 128, 8),
    }


def demand(options: list[str]) -> tuple[int, int, int]:
    """How many requests a workload has, and the tokens of each and of its answer."""

    def value(*names: str) -> int:
        for name in names:
            if name in options:
                return int(options[options.index(name) + 1])
        return 0

    tokens = value("--random-input-len", "--input-len")
    items = value("--random-mm-base-items-per-request")
    # Of an image, and of a frame with its time.
    is_video = str(VIDEO) in str(options)
    tokens += items * (80 * VIDEO[2] if is_video else SOFT_TOKENS + 2)
    answer = value("--random-output-len", "--output-len")
    return value("--num-prompts", "--batch-size"), tokens, answer


def agreement(found: list[list[int]], expected: list[list[int]]) -> dict[str, int]:
    """Compare greedy tokens, those of a request a list.

    Returns:
        The ``requests``, how many ``first`` tokens are equal, the ``tokens`` of all and
        how many are ``equal`` before the first difference of each request.

    Raises:
        RuntimeError: They do not answer the same requests.
    """
    lengths = [[len(tokens) for tokens in rows] for rows in (found, expected)]
    if lengths[0] != lengths[1] or not found:
        raise RuntimeError(f"unlike numbers of tokens: {lengths[0]} and {lengths[1]}")
    equal = first = 0
    for ours, theirs in zip(found, expected, strict=True):
        same = np.asarray(ours) == np.asarray(theirs)
        first += bool(same[0])
        equal += int(same.cumprod().sum())
    count = sum(lengths[0])
    return {"requests": len(found), "first": first, "tokens": count, "equal": equal}


def _text(tokens: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(300, 10000, tokens).tolist()
    return ids


def _request(tokens: int, images: int, image_id: int, seed: int) -> dict[str, Any]:
    """A prompt that has ``tokens`` when each image's token has become 282."""
    from PIL import Image

    ids = _text(tokens - (SOFT_TOKENS + 2) * images, seed)
    # The last one is in the window of what is answered: whether that is right depends
    # on it.
    for at in np.linspace(0, max(len(ids) - 64, 1), images + 1, dtype=int)[:0:-1]:
        ids.insert(int(at), image_id)
    if not images:
        return {"prompt_token_ids": ids}
    height, width = IMAGE
    seeds = [(seed * images + i) % PICTURES for i in range(images)]
    known = {s: Image.fromarray(demo.picture(width, height, s)) for s in set(seeds)}
    return {
        "prompt_token_ids": ids,
        "multi_modal_data": {"image": [known[s] for s in seeds]},
    }


def client(checkpoint: str) -> str:
    """Where the tokenizer is of those who make texts for a checkpoint."""
    return f"{checkpoint}-client"


def attention_layers(model: Any) -> list[str]:
    """Window, head size, backend and version of the kinds of attention layers."""
    found: dict[str, None] = {}
    for module in model.modules():
        if hasattr(module, "impl") and hasattr(module, "attn_backend"):
            text = f"window {module.sliding_window}, head size {module.head_size}:"
            text += f" {module.attn_backend.get_name()}"
            for impl in module.impl.get_impl_variants():
                if version := getattr(impl, "vllm_flash_attn_version", None):
                    text += f" FA{version}"
            found[text] = None
    return list(found)


class Engine:
    """The engine of one tree."""

    def __init__(
        self, checkpoint: str, form: str, level: str, context: int, kv_gib: int
    ) -> None:
        if level == "serving":
            # As it is served: the engine in a process of its own.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        import torch
        from vllm import LLM

        self.cuda = torch.cuda.is_available()
        arguments: dict[str, Any] = {
            "model": checkpoint,
            "load_format": "dummy",
            "dtype": "bfloat16",
            "max_model_len": context,
            "max_num_batched_tokens": STEP_TOKENS if self.cuda else 4096,
            "max_num_seqs": 128,
            "enable_prefix_caching": False,
            "limit_mm_per_prompt": {"image": 512, "video": 1, "audio": 0},
            "attention_config": FORMS[form][0],
            # Preempted requests are counted.
            "disable_log_stats": False,
        }
        if level == "serving":
            sizes = [1, 2, 4, 8, 16, 32, 64, arguments["max_num_seqs"]]
            arguments["compilation_config"] = {"cudagraph_capture_sizes": sizes}
        else:
            # A long prefill is as fast, and starts much sooner.
            arguments["enforce_eager"] = True
        if self.cuda:
            # The other engines use the GPU, too: free memory says nothing.
            arguments["kv_cache_memory_bytes"] = kv_gib << 30
            arguments["gpu_memory_utilization"] = 0.1
        self.llm = LLM(**arguments)
        self.llm.apply_model(real_gemma4.fill)
        self.requests = functools.lru_cache(maxsize=4)(self._requests)
        self.sampled: dict[tuple[str, ...], Any] = {}
        self.model: Any = None
        if level == "serving":
            self.llm.apply_model(real_gemma4.vary_features)
        else:
            # It is timed, so it lives here.
            self.llm.apply_model(lambda model: setattr(self, "model", model))

    @property
    def config(self) -> Any:
        return self.llm.llm_engine.vllm_config.model_config

    def layers(self) -> list[str]:
        found: list[str] = self.llm.apply_model(attention_layers)[0]
        return found

    def _requests(self, rows: int, tokens: int, images: int) -> list[dict[str, Any]]:
        image_id = self.config.hf_config.image_token_id
        return [_request(tokens, images, image_id, seed) for seed in range(rows)]

    def _synchronize(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def _timed(
        self, tower: bool
    ) -> Iterator[tuple[list[tuple[int, float]], list[float]]]:
        """Note tokens and milliseconds of each forward, and the tower's milliseconds.

        Without ``tower`` that does not run: images have features all the same.
        """
        forward, embed = self.model.forward, self.model.embed_multimodal
        steps: list[tuple[int, float]] = []
        towers: list[float] = []

        def timed(function: Callable[..., Any], kwargs: Any) -> tuple[Any, float]:
            self._synchronize()
            begin = time.perf_counter()
            result = function(**kwargs)
            self._synchronize()
            return result, 1e3 * (time.perf_counter() - begin)

        def timed_forward(**kwargs: Any) -> Any:
            result, milliseconds = timed(forward, kwargs)
            steps.append((kwargs["positions"].shape[-1], milliseconds))
            return result

        def timed_embed(**kwargs: Any) -> Any:
            if not tower:
                like = next(self.model.parameters())
                width = self.config.hf_text_config.hidden_size
                empty = like.new_empty(1).expand(SOFT_TOKENS, width)
                return real_gemma4.varied([empty] * len(kwargs["pixel_values"]), kwargs)
            result, milliseconds = timed(embed, kwargs)
            towers.append(milliseconds)
            return real_gemma4.varied(result, kwargs)

        with (
            mock.patch.object(self.model, "forward", timed_forward),
            mock.patch.object(self.model, "embed_multimodal", timed_embed),
        ):
            yield steps, towers

    def prefill(
        self, rows: int, tokens: int, images: int, tower: bool, causal: bool = False
    ) -> dict[str, Any]:
        """Prefill prompts of ``tokens`` with ``images`` each, in one step if they fit.

        With ``causal`` images attend as text does, which is wrong.

        Returns:
            Milliseconds of the ``model`` and of the ``tower``, MiB of memory above what
            was used before, the number of ``steps``, each prompt's next token, whether
            these are the prompts' last ones, and the ``logprobs`` of the likeliest.

        Raises:
            RuntimeError: Other tokens than those went through the model.
        """
        import torch
        from vllm import SamplingParams
        from vllm.v1.attention.backend import CommonAttentionMetadata

        requests = self.requests(rows, tokens, images)
        params = SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True, logprobs=LIKELY
        )
        self.llm.llm_engine.engine_core.reset_encoder_cache()
        before = 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        nowhere = property(lambda _: None, lambda _, ranges: None)
        with contextlib.ExitStack() as stack:
            if causal:
                ranges = mock.patch.object(
                    CommonAttentionMetadata, "mm_req_doc_ranges", nowhere
                )
                stack.enter_context(ranges)
            steps, towers = stack.enter_context(self._timed(tower))
            outputs = self.llm.generate(requests, params, use_tqdm=False)
        most = torch.cuda.max_memory_allocated() if self.cuda else 0
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        last = [[request["prompt_token_ids"][-1]] for request in requests]
        if not rows * tokens <= sum(size for size, _ in steps) <= rows * tokens + 1024:
            raise RuntimeError(f"no steps of {rows * tokens} tokens: {steps}")
        return {
            "model": sum(milliseconds for _, milliseconds in steps),
            "tower": sum(towers),
            "mib": (most - before) / 2**20,
            "steps": len(steps),
            "tokens": answers,
            # One request may do so by chance.
            "repeats": rows > 1 and answers == last,
            "logprobs": [
                {token: found.logprob for token, found in first.items()}
                for first in (output.outputs[0].logprobs[0] for output in outputs)
            ],
        }

    def preempted(self) -> int:
        """How often a request had to wait again, as the KV cache was full."""
        counters = [
            metric
            for metric in self.llm.get_metrics()
            if metric.name == "vllm:num_preemptions"
        ]
        return int(sum(counter.value for counter in counters))

    def _parsed(
        self, bench: str, options: list[str], seed: int, out: str
    ) -> tuple[Any, argparse.Namespace]:
        """The module of one of vLLM's benchmarks, and its arguments."""
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        module = importlib.import_module(f"vllm.benchmarks.{bench}")
        parser = FlexibleArgumentParser()
        module.add_cli_args(parser)
        given = [*options, "--model", self.config.model, "--disable-detokenize"]
        given += ["--tokenizer", client(self.config.model), "--output-json", out]
        given += ["--max-model-len", str(self.config.max_model_len)]
        np.random.seed(seed)
        return module, parser.parse_args([*given, "--seed", str(seed)])

    def sample(self, options: list[str], seed: int) -> None:
        """Make the requests of a workload of throughput, which takes seconds."""
        from vllm.tokenizers import get_tokenizer

        key = (*options, str(seed))
        if key not in self.sampled:
            module, args = self._parsed("throughput", options, seed, "")
            module.validate_args(args)
            tokenizer = get_tokenizer(args.tokenizer)
            self.sampled = {key: module.get_requests(args, tokenizer)}

    def run(
        self, bench: str, options: list[str], seed: int, greedy: bool
    ) -> dict[str, Any]:
        """Run one of vLLM's benchmarks once.

        Returns:
            ``seconds``, of throughput also ``tokens_per_second`` and ``tokens``; of a
            ``greedy`` run what was ``answered``.
        """
        import vllm

        answered: list[list[int]] = []

        def greedily(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # Both take them second.
            params = args[1] if len(args) > 1 else kwargs["sampling_params"]
            for param in params if isinstance(params, list) else [params]:
                param.temperature = 0.0
            outputs = generate(*args, **kwargs)
            answered[:] = [list(output.outputs[0].token_ids) for output in outputs]
            return outputs

        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            out = f"{folder}/out.json"
            module, args = self._parsed(bench, options, seed, out)
            make = lambda _: self.llm  # noqa: E731
            patch = mock.patch.object
            stack.enter_context(patch(vllm.LLM, "from_engine_args", make))
            if bench == "throughput":
                self.sample(options, seed)
                [sampled] = self.sampled.values()
                known = lambda *_: sampled  # noqa: E731
                stack.enter_context(patch(module, "get_requests", known))
            for name in ("generate", "chat") if greedy else ():
                call = functools.partial(greedily, getattr(self.llm, name))
                stack.enter_context(patch(self.llm, name, call))
            module.main(args)
            found = json.loads(Path(out).read_text())
        if bench == "latency":
            latencies = found["latencies"]
            result = {"seconds": float(np.median(latencies)), "latencies": latencies}
        else:
            wanted = args.random_input_len + args.random_output_len
            if "random-mm" in options:
                # An image or video of these sizes has more than 200.
                wanted += 200 * args.random_mm_base_items_per_request
            elif found["total_num_tokens"] > 1.01 * args.num_prompts * (wanted + 1):
                raise RuntimeError(f"there were more than {wanted} tokens in prompts")
            if found["total_num_tokens"] < args.num_prompts * wanted:
                raise RuntimeError(f"there were no {wanted} tokens in prompts")
            names = ("elapsed_time", "tokens_per_second", "total_num_tokens")
            seconds, rate, tokens = (found[name] for name in names)
            result = {"seconds": seconds, "tokens_per_second": rate, "tokens": tokens}
        return result | ({"answered": answered} if greedy else {})


Record = dict[str, Any]


def nats(
    found: list[dict[str, float]], expected: list[dict[str, float]]
) -> float | None:
    """The largest difference of log probabilities, of tokens that both list.

    Args:
        found: Log probabilities by token, those of a request a dictionary.
        expected: The same requests'.

    Returns:
        None if no token is in both lists of a request.
    """
    differences = [
        abs(ours[token] - theirs[token])
        for ours, theirs in zip(found, expected, strict=True)
        for token in ours.keys() & theirs.keys()
    ]
    return max(differences, default=None)


def same_as(
    ours: dict[str, Any], theirs: dict[str, Any], reference: str
) -> dict[str, Any]:
    """The agreement of two prefills, with the largest difference in ``nats``."""
    found: dict[str, Any] = {**agreement(ours["tokens"], theirs["tokens"])}
    found["nats"] = nats(ours["logprobs"], theirs["logprobs"])
    return found | {"with": reference}


Runs = list[dict[str, Any]]
Prefill = tuple[int, int, int, bool]  # what ``Engine.prefill`` takes


def _prefills(
    engines: Mapping[str, Process], args: argparse.Namespace, *given: Prefill
) -> dict[str, list[tuple[Runs, dict[str, Any] | None]]]:
    """Runs of prefills by turns, and the agreement of their tokens, by engine.

    That of the reference is with itself, of another run, and has how images that attend
    as text would agree: what a wrong mask looks like.
    """
    calls = {
        (name, i): functools.partial(engine, "prefill", *prefill)
        for i, prefill in enumerate(given)
        for name, engine in engines.items()
    }
    worker.by_turns(calls, 1, 3, 1.0)  # a warm-up
    found = worker.by_turns(calls, 5, args.repeat, args.seconds * len(given))
    reference = next((name for name in REFERENCES if name in engines), None)
    results: dict[str, list[tuple[Runs, dict[str, Any] | None]]] = {}
    for (name, i), runs in found.items():
        same: dict[str, Any] | None = None
        if reference:
            theirs = found[reference, i][1 if name == reference else 0]
            # The last token is repeated whatever attention makes of it.
            if not runs[0]["repeats"] and not theirs["repeats"]:
                same = same_as(runs[0], theirs, reference)
                if name == reference and given[i][2] and not given[i][3]:
                    wrong = engines[name]("prefill", *given[i], True)
                    same["causal"] = same_as(wrong, theirs, reference)
        results.setdefault(name, []).append((runs, same))
    return results


def bench_step(
    engines: Mapping[str, Process], args: argparse.Namespace
) -> Iterator[Record]:
    """Time one prefill step, of text alone and with images."""
    steps = STEPS if args.shrink == 1 else [(1, 600, 2)]
    for rows, tokens, images in steps:
        case = f"{rows} x {tokens:,}, {images} images" + (" each" if rows > 1 else "")
        given = [(rows, tokens, 0, False), (rows, tokens, images, False)]
        apart = _prefills(engines, args, *given)
        # Behind the tower's matrix products the GPU's clock is lower for a while.
        whole = _prefills(engines, args, (rows, tokens, images, True))
        for name in engines:
            (of_text, same_text), (of_mixed, same) = apart[name]
            [(of_whole, _)] = whole[name]
            parts = {
                "text": [run["model"] for run in of_text],
                "images": [run["model"] for run in of_mixed],
                "tower": [run["tower"] for run in of_whole],
                "images and tower": [run["model"] + run["tower"] for run in of_whole],
            }
            for variant, samples in parts.items():
                record: Record = {"case": case, "tree": name, "variant": variant}
                record |= worker.spread(samples)
                if same is not None and variant in ("text", "images"):
                    record["agreement"] = same_text if variant == "text" else same
                yield record


def bench_scaling(
    engines: Mapping[str, Process], args: argparse.Namespace
) -> Iterator[Record]:
    """Time prefills of longer contexts and of a larger share of images."""
    plans: list[tuple[str, float, int, float]] = []
    for context in CONTEXTS[: 2 if args.shrink > 1 else None]:
        plans.append(("context", context, context - 8, CONTEXT_SHARE))
    for share in SHARES:
        tokens = max(SHARES_CONTEXT // args.shrink, 1500)
        plans.append(("image_share", share, tokens, share))
    for axis, x, tokens, share in plans:
        images = round(share * tokens / (SOFT_TOKENS + 2))
        if share:
            images = min(max(images, 1), (tokens - 1) // (SOFT_TOKENS + 2))
        found = _prefills(engines, args, (1, tokens, images, False))
        for name, [(runs, same)] in found.items():
            record = {"axis": axis, "x": x, "tree": name, "images": images}
            record |= worker.spread([run["model"] / 1e3 for run in runs])
            record["mib"] = max(run["mib"] for run in runs)
            record["prompt"], record["steps"] = tokens, runs[0]["steps"]
            if same is not None:
                record["agreement"] = same
            yield record


def bench_serving(
    engines: Mapping[str, Process], args: argparse.Namespace
) -> Iterator[Record]:
    """Run vLLM's benchmarks; the first run of each is a greedy one, and not timed."""
    known = workloads(args.shrink)
    for name in args.workloads or known:
        yield from serve(engines, name, *known[name], args.repeat, args.seconds)


def serve(
    engines: Mapping[str, Process],
    workload: str,
    bench: str,
    options: list[str],
    repeat: int,
    seconds: float,
) -> Iterator[Record]:
    """Run a workload by turns, after a greedy one as a warm-up.

    Images have a second one. There are three turns that count, two of long ones, and
    more up to ``repeat`` until ``seconds`` have passed. The reference answers greedily
    twice: what batches requests are in differs from run to run, and so do answers.
    Those that repeat a token, which attention does not matter for, are not compared.
    """
    has_images = "random-mm" in options
    warm_ups = 2 if has_images else 1
    runs: dict[str, Runs] = {name: [] for name in engines}
    before = {name: engine("preempted") for name, engine in engines.items()}
    reference = next((name for name in REFERENCES if name in engines), None)
    again: list[list[int]] = []
    begin = time.perf_counter()

    def rounds() -> Iterator[list[str]]:
        yield from worker.turns(engines, warm_ups)
        is_long = time.perf_counter() - begin > LONG * warm_ups
        yield from worker.turns(engines, 2 if is_long else 3, repeat, seconds)

    for turn, names in enumerate(rounds()):
        # Texts are forgotten, but an image that was seen is processed already.
        seed = turn if has_images else 0
        if bench == "throughput":
            with ThreadPoolExecutor(worker.at_once()) as pool:
                made = [
                    pool.submit(engine, "sample", options, seed)
                    for engine in engines.values()
                ]
            for result in made:
                result.result()
        for name in names:
            found = engines[name]("run", bench, options, seed, turn == 0)
            runs[name].append(found)
        if turn == 0 and reference:
            found = engines[reference]("run", bench, options, seed, True)
            again = found["answered"]
    unit = "tokens_per_second" if bench == "throughput" else "seconds"
    prompts, _, _ = demand(options)
    answered = {name: found[0].pop("answered") for name, found in runs.items()}
    repeating = set()
    for name, texts in answered.items():
        longer = [tokens for tokens in texts if len(tokens) > 1]
        alike = sum(len(set(tokens)) == 1 for tokens in longer)
        if 2 * alike > len(longer):
            print(f"{name} repeats one token: its answers say nothing", flush=True)
            repeating.add(name)
    for name, found in runs.items():
        record: Record = {
            "workload": workload,
            "bench": bench,
            "prompts": prompts,
            "tree": name,
            "unit": unit,
            "preempted": engines[name]("preempted") - before[name],
        }
        samples = {key: [run[key] for run in found[warm_ups:]] for key in found[0]}
        record |= worker.spread(samples[unit]) | {"samples": samples}
        if reference and not {name, reference} & repeating:
            ours = again if name == reference else answered[name]
            same = agreement(ours, answered[reference])
            record["agreement"] = same | {"with": reference}
        yield record


BENCHES = {"step": bench_step, "scaling": bench_scaling, "serving": bench_serving}


def kv_gib(kind: str, layers: int, level: str = "serving") -> int:
    """GiB of KV cache that all requests of a level have room in, at least 4."""
    text = real_gemma4.text(kind, layers)
    window, heads = text["sliding_window"], text["num_key_value_heads"]
    global_heads = text["num_global_key_value_heads"] or heads
    own = text["layer_types"][: layers - text.get("num_kv_shared_layers", 0)]
    # Bytes that a token takes: keys and values in bfloat16.
    sliding = 4 * heads * text["head_dim"] * own.count("sliding_attention")
    full = 4 * global_heads * text["global_head_dim"] * own.count("full_attention")
    requests = [(rows, tokens, 1) for rows, tokens, _ in STEPS] + [(1, CONTEXTS[-1], 1)]
    if level == "serving":
        requests = [demand(options) for _, options in workloads(1).values()]
    needs: list[int] = []
    for rows, tokens, answer in requests:
        # What a step brings is there before the window forgets it.
        step = min(rows * tokens, STEP_TOKENS) if tokens > window else 0
        held = rows * min(tokens + answer, window + 16) + step
        needs.append(sliding * held + full * rows * (tokens + answer))
    return max(4, math.ceil(1.15 * max(needs) / 2**30))


def fitting(
    kind: str, layers: int, engines: int, gigabytes: float, level: str = "serving"
) -> int:
    """Return how many layers there can be on a GPU, at least a period of them.

    Args:
        kind: A key of ``real_gemma4.TEXTS``.
        layers: At most so many.
        engines: That share the GPU.
        gigabytes: Its memory, in 1e9.
        level: A key of ``BENCHES``.

    Raises:
        RuntimeError: Not even a period fits.
    """
    each = 0.94 * gigabytes / engines

    def needed(count: int) -> float:
        # Activations of a step, kernels and graphs.
        rest = 4.5 + kv_gib(kind, count, level) * 2**30 / 1e9
        return real_gemma4.gigabytes(kind, count) + rest

    period = real_gemma4.period(kind)
    while layers > period and needed(layers) > each:
        layers -= layers % period or period
    if needed(layers) > each:
        raise RuntimeError(
            f"{engines} engines of {layers} layers take {needed(layers):.0f} GB each,"
            f" {each:.0f} of which this GPU has: ask for fewer --forms"
        )
    return layers


def write_model(kind: str, layers: int, cuda: bool) -> Path:
    """Write a checkpoint without weights; return its folder.

    Args:
        kind: A key of ``real_gemma4.TEXTS``.
        layers: Of its language model.
        cuda: Else it has few tokens and few layers in its tower, for a CPU.
    """
    text = real_gemma4.text(kind, layers)
    # The tokenizer's few are among them, and the latency benchmark's 10,000.
    text["vocab_size"] = 262144 if cuda else 16384
    if "hidden_size_per_layer_input" in text:
        text["vocab_size_per_layer_input"] = text["vocab_size"]
    tower: dict[str, Any] = dict(real_gemma4.TOWERS[kind])
    if not cuda and "num_hidden_layers" in tower:
        tower["num_hidden_layers"] = 2
    where = "cuda" if cuda else "cpu"
    folder = ROOT / "build" / "cache" / f"engine-{kind}-{layers}-{where}"
    with demo.quiet():
        real_gemma4.write(folder, kind, text, tower)
        real_gemma4.write_tokenizer(Path(client(str(folder))))
    return folder


def show(record: Record) -> str:
    """A record's line."""
    names = ("workload", "case", "axis", "x", "variant", "tree")
    what = " ".join(str(record[name]) for name in names if name in record)
    low, high = record["quartiles"]
    line = f"{what:<52} {record['median']:>12,.3f} {low:>12,.3f} to {high:<12,.3f}"
    if same := record.get("agreement"):
        line += f" {same['first']} of {same['requests']} first tokens"
    return line


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its lines; return the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_engine", description=__doc__.splitlines()[0]
    )
    parser.add_argument("level", choices=sorted(BENCHES), nargs="?")
    parser.add_argument("--kind", choices=sorted(real_gemma4.TEXTS), default="26b")
    help = "of the language model at most (default: 12, on CPU 1); fewer if no more fit"
    parser.add_argument("--layers", type=int, help=help)
    help = "some of the workloads of serving, separated by semicolons"
    parser.add_argument("--workloads", type=lambda text: text.split(";"), help=help)
    help = "divide lengths and prompts by this (default: 1, 64 on CPU)"
    parser.add_argument("--shrink", type=int, help=help)
    help = "most runs of each (default: 7 of a workload, 25 of a prefill)"
    parser.add_argument("--repeat", type=int, help=help)
    help = "after so long there are no more runs, but five of a prefill and two or"
    help += " three of a workload (default: 15 of a workload, 6 of a prefill)"
    parser.add_argument("--seconds", type=float, help=help)
    help = f"of {', '.join(FORMS)} (default: the first three, on CPU two of them)"
    parser.add_argument("--forms", type=lambda text: text.split(","), help=help)
    parser.add_argument("--json", type=Path, help="append the records to this file")
    for hidden in ("--checkpoint", "--form", "--tree", "--context", "--kv"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        # By its name, so that the process of the engine finds what is sent there.
        from scripts import bench_engine

        given = (args.checkpoint, args.form, args.level)
        sizes = int(args.context), int(args.kv)
        make = functools.partial(bench_engine.Engine, *given, *sizes)
        worker.serve(make, args.tree)
        return 0
    if args.level is None:
        parser.error(f"there are {', '.join(sorted(BENCHES))}")

    import torch

    from scripts import unpatched

    cuda = torch.cuda.is_available()
    args.shrink = args.shrink or (1 if cuda else 64)
    args.repeat = args.repeat or (7 if args.level == "serving" else 25)
    if args.seconds is None:
        args.seconds = 15 if args.level == "serving" else 6
    forms = args.forms or (list(FORMS)[:3] if cuda else ["release", "patched"])
    unknown = set(forms) - set(FORMS)
    unknown |= set(args.workloads or ()) - set(workloads(1))
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    layers = args.layers or (12 if cuda else 1)
    device = "cpu"
    if cuda:
        gpu = torch.cuda.get_device_properties(0)
        device = gpu.name
        try:
            memory = gpu.total_memory / 1e9
            room = fitting(args.kind, layers, len(forms), memory, args.level)
        except RuntimeError as error:
            parser.exit(1, f"bench_engine: {error}\n")
        if args.layers and room < layers:
            parser.exit(1, f"bench_engine: {room} layers fit, not {layers}\n")
        layers = room
    context = CONTEXTS[-1] if args.level == "scaling" and cuda else STEP_TOKENS
    about: Record = {"kind": args.kind, "layers": layers, "dtype": "bfloat16"}
    about |= {"device": device, "kv_gib": kv_gib(args.kind, layers, args.level)}
    try:
        checkpoint = write_model(args.kind, layers, cuda)
        arguments = {}
        for name in forms:
            arguments[name] = [args.level, "--checkpoint", str(checkpoint)]
            arguments[name] += ["--form", name]
            arguments[name] += ["--context", str(context)]
            arguments[name] += ["--kv", str(about["kv_gib"])]
            if FORMS[name][1]:
                arguments[name] += ["--tree", str(unpatched.unpatched_tree())]
        with worker.engines("scripts.bench_engine", arguments) as engines:
            attention = {name: engine("layers") for name, engine in engines.items()}
            for name, kinds in attention.items():
                print(f"{name}: {'; '.join(kinds)}")
            print(f"\n{args.kind}, {layers} layers\n", flush=True)
            for record in BENCHES[args.level](engines, args):
                record |= about | {"attention": attention[record["tree"]]}
                print(show(record), flush=True)
                worker.keep(args.json, record)
    except (OSError, RuntimeError) as error:
        print(f"bench_engine: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
