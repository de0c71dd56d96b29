# SPDX-License-Identifier: Apache-2.0
"""Offer chat with images at rising rates until the servers of both trees saturate.

An OpenAI server for the release and one for the patched tree, up all the time, and
``vllm bench serve`` of this environment as the client of both. Each rate is offered to
them by turns, the same requests at the same times, and is twice the one before, until
no server keeps up with it; at last all requests come at once. Dummy weights of real
width; no image comes twice, so that nothing is found in a cache.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from scripts import demo, real_gemma4, worker
from scripts.bench_engine import (
    FORMS,
    IMAGE,
    SOFT_TOKENS,
    agreement,
    attention_layers,
    fitting,
    write_model,
)
from scripts.worker import ROOT

IMAGE_TOKENS = SOFT_TOKENS + 2  # with those for its begin and end
MOST_IMAGES = 4
KEEPS_UP = 0.8  # of the requests, see ``pace``
SLOW = 5.0  # times the time to the first token without load, see ``saturated``
HOST = "127.0.0.1"
START = 1200  # seconds in which a server must be up
MOST_AT_ONCE = 256  # requests of a batch
ANSWERS = 8  # requests that are compared

# ``vllm serve``, after it said which vLLM it is.
_SERVE = """
import vllm.entrypoints.cli.main as cli
print("vLLM from", cli.__file__, flush=True)
cli.main()
"""
# Runs a command whose processes all end when it does, and when its stdin does: when
# this process ends, however that happens.
_GUARD = '("$@"; kill -KILL 0) & cat > /dev/null; kill -KILL 0'


@dataclasses.dataclass(frozen=True)
class Load:
    """What a request has: images from ``fewest`` to ``most``, all equally often.

    Of text there are ``inputs`` tokens, without the chat template's, fewer than an
    image has. The answer has ``outputs``.
    """

    fewest: int
    most: int
    inputs: int = 256
    outputs: int = 64

    def options(self, requests: int, rate: float, seed: int) -> list[str]:
        """The options of ``vllm bench serve``, but for the server's.

        Args:
            requests: How many.
            rate: Of their Poisson process, a second; infinite for all at once. vLLM
                scales its times so that the last one comes after ``requests / rate``.
            seed: Of times, texts and images.
        """
        # vLLM takes as many as floor(base * (1 - ratio)) to ceil(base * (1 + ratio)).
        base = math.ceil((self.fewest + self.most) / 2)
        ratio = (base - self.fewest) / base
        limits = {"image": self.most, "video": 0}
        return [
            *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
            *("--dataset-name", "random-mm", "--num-prompts", str(requests)),
            *("--random-input-len", str(self.inputs)),
            *("--random-output-len", str(self.outputs)),
            *("--random-mm-base-items-per-request", str(base)),
            *("--random-mm-num-mm-items-range-ratio", str(ratio)),
            *("--random-mm-limit-mm-per-prompt", json.dumps(limits)),
            *("--random-mm-bucket-config", str({(*IMAGE, 1): 1.0})),
            *("--request-rate", str(rate), "--seed", str(seed)),
            *("--temperature", "0", "--ignore-eos", "--disable-tqdm"),
            *("--percentile-metrics", "ttft,tpot,e2el", "--save-detailed"),
        ]


WORKLOADS = {
    "chat, 1 to 4 images": Load(1, MOST_IMAGES),
    "chat, 1 image": Load(1, 1),
}


class ClientIsLateError(RuntimeError):
    """The client could not send requests as fast as it should."""


class Extension:
    """What ``/collective_rpc`` of a server can call in its worker."""

    if TYPE_CHECKING:
        get_model: Callable[[], Any]

    def prepare_for_rates(self) -> dict[str, Any]:
        """Replace the dummy weights; return what the worker is made of.

        That is ``tree``, where vLLM was imported from, ``patched``, whether that has
        the series, and ``attention``, a line for each kind of layer.
        """
        import torch
        import vllm

        from scripts.real_gemma4 import fill, vary_features

        model = self.get_model()
        with torch.inference_mode():
            fill(model)
        vary_features(model)
        return {
            "tree": str(Path(vllm.__file__).parents[1]),
            "patched": bool(importlib.util.find_spec("vllm.v1.attention.mm_prefix")),
            "attention": attention_layers(model),
        }


class Server:
    """``vllm serve`` of one tree, its processes and its log."""

    def __init__(self, name: str, folder: Path) -> None:
        """Of one of ``bench_engine.FORMS``; the folder is for its log and sockets."""
        from scripts import unpatched

        self.options, is_release = FORMS[name]
        self.tree = unpatched.unpatched_tree() if is_release else None
        self.name, self.folder, self.log = name, folder, folder / f"{name}.log"
        # Nobody else's server answers to this name.
        self.model = f"{name}-{os.getpid()}"
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.attention: list[str] = []
        self.asked_again = 0.0  # images that it was given twice

    def start(self, options: Sequence[str]) -> None:
        """Start it and prepare its model.

        Args:
            options: Of ``vllm serve``, the model first.

        Raises:
            RuntimeError: It ended, or is not of the form's tree or backend.
        """
        given = [*options, "--served-model-name", self.model, "--host", HOST]
        given += ["--attention-config", json.dumps(self.options)]
        # Another process can take a port that was free.
        for _ in range(3):
            self._launch(given)
            if self._comes_up():
                self._prepare()
                return
            if "address already in use" not in self._said():
                break
        raise self.failed("ended")

    def _launch(self, options: Sequence[str]) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = probe.getsockname()[1]
        serve = [sys.executable, "-c", _SERVE, "serve", *options]
        trees = [str(self.tree)] if self.tree else []
        path = [*trees, str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", _GUARD, "sh", *serve, "--port", str(self.port)],
                # Before what the environment puts first, which PYTHONPATH is not.
                cwd=self.tree or ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path),
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "VLLM_LOGGING_LEVEL": "INFO",
                    "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_RPC_BASE_PATH": str(self.folder),
                    # Has /collective_rpc.
                    "VLLM_SERVER_DEV_MODE": "1",
                    # One server waits while another works: it must not spin.
                    "OMP_WAIT_POLICY": "passive",
                    "KMP_BLOCKTIME": "0",
                },
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.process is not None and self.process.poll() is None

    def _comes_up(self) -> bool:
        """Wait until it answers, or has ended.

        Raises:
            RuntimeError: It does neither.
        """
        begin = time.perf_counter()
        while self.is_alive():
            if time.perf_counter() - begin > START:
                raise self.failed(f"did not come up in {START} s")
            with contextlib.suppress(OSError):
                self.ask("/health")
                return True
            time.sleep(0.5)
        return False

    def _prepare(self) -> None:
        body = {"method": "prepare_for_rates"}
        [about] = json.loads(self.ask("/collective_rpc", body))["results"]
        tree, self.attention = Path(about["tree"]), about["attention"]
        is_right = not self.tree or tree.samefile(self.tree)
        # The server's own process says so in its log, the worker's was asked.
        if f"vLLM from {tree / 'vllm'}{os.sep}" not in self._said():
            is_right = False
        if not is_right or about["patched"] is bool(self.tree):
            raise RuntimeError(f"{tree} is not the tree of the {self.name} server")
        backend = self.options.get("backend", "")
        is_right = all(backend in layer for layer in self.attention)
        if not is_right or not self.attention:
            raise RuntimeError(f"{self.name} has attention {self.attention}")
        print(f"{self.name}: vLLM from {tree}; {'; '.join(self.attention)}")

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> str:
        """Return what it answers to a GET request, or to a POST of ``body``.

        Raises:
            OSError: It does not answer, or answers with an error.
        """
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}{path}",
            json.dumps(body).encode() if body is not None else None,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            text: str = answer.read().decode()
        return text

    def answer(self, seed: int, images: int, outputs: int) -> list[int]:
        """Return the tokens that it answers greedily to a request of its own.

        Args:
            seed: Of the text and the images.
            images: How many.
            outputs: How many tokens.
        """
        from vllm.multimodal.utils import encode_image_url

        content: list[dict[str, Any]] = []
        height, width = IMAGE
        for place in range(images):
            picture = demo.picture(width, height, 1000 + seed * MOST_IMAGES + place)
            url = {"url": encode_image_url(Image.fromarray(picture))}
            content.append({"type": "image_url", "image_url": url})
        letters = np.random.default_rng(seed).integers(33, 127, 32).tolist()
        content.append({"type": "text", "text": "".join(map(chr, letters))})
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": outputs,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        [choice] = json.loads(self.ask("/v1/chat/completions", body))["choices"]
        tokens: list[int] = choice["token_ids"]
        return tokens

    def hits(self) -> float:
        """Return how many images and prompt tokens it has found in its caches.

        Those of `same_answers` do not count.

        Raises:
            RuntimeError: It does not count them.
        """
        names = ("vllm:mm_cache_hits_total", "vllm:prefix_cache_hits_total")
        lines = self.ask("/metrics").splitlines()
        found = [float(line.split()[-1]) for line in lines if line.startswith(names)]
        if not found:
            raise RuntimeError(f"the {self.name} server counts no hits of its caches")
        return sum(found) - self.asked_again

    def _said(self) -> str:
        return self.log.read_text(errors="replace")

    def failed(self, how: str) -> RuntimeError:
        """Show its log; return an error for the caller to raise."""
        said = self._said()
        # What comes first is the cause, which much may follow.
        first = max(said.find(" ERROR "), said.find("Traceback"))
        sys.stderr.write(said[first:][:5000] if first >= 0 else said[-5000:])
        return RuntimeError(f"the {self.name} server {how}; its log is above")

    def stop(self) -> None:
        """End all its processes, whatever they do."""
        if self.process is not None:
            if self.is_alive():
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


@contextlib.contextmanager
def servers(forms: Sequence[str], options: Sequence[str]) -> Iterator[list[Server]]:
    """Start a server of each form, as many at a time as have two cores each; end them.

    Args:
        forms: Of ``bench_engine.FORMS``.
        options: Of ``vllm serve``, the model first.

    Raises:
        RuntimeError: One ended, or is of another tree.
    """
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(server: Server) -> None:
            print(f"starting the {server.name} server ...", flush=True)
            stack.callback(server.stop)
            server.start(options)
            print(f"{server.name}: {time.perf_counter() - begin:.0f} s", flush=True)

        found = [Server(name, folder) for name in forms]
        with ThreadPoolExecutor(worker.at_once()) as pool:
            list(pool.map(start, found))
        yield found


def pace(starts: Sequence[float], latencies: Sequence[float]) -> float:
    """Return the share of requests that were answered while others still came.

    A run's throughput says too little: the run ends later than its last request comes,
    by that one's latency, however fast the server is. So only those count that came
    long enough before the last one, by the shortest latency of the run. Latencies alone
    say too little as well: once no more requests come, a batch of all of them ends at
    about the same time, and late ones seem fast.

    Args:
        starts: Seconds at which requests were sent.
        latencies: Seconds from then to their last tokens.

    Returns:
        The share, at most one, which it is where none came long enough before.

    Raises:
        ValueError: They were not sent at different times.
    """
    begins, ends = np.asarray(starts, float), np.add(starts, latencies)
    if not np.ptp(begins):
        raise ValueError("requests that come all at once have no rate")
    due = int(np.sum(begins + np.min(latencies) <= begins.max()))
    return float(np.sum(ends <= begins.max())) / due if due else 1.0


def saturated(record: Mapping[str, Any], unloaded_ms: float) -> bool:
    """Return whether a server could not take a rate.

    It answers fewer than four of five requests in the time in which they come (see
    ``pace``), or half of the requests wait for their first token more than five times
    as long as without load: a queue, though it may not have grown in the short run. Or
    it gave up requests.

    Args:
        record: Of that server and rate.
        unloaded_ms: The shortest median time to the first token at any rate, in
            milliseconds, of the slowest server: one limit for all of them.
    """
    waits = record["median_ttft_ms"] > SLOW * unloaded_ms
    return bool(record["failed"] or record["pace"] < KEEPS_UP or waits)


def offer(
    server: Server, tokenizer: Path, load: Load, requests: int, rate: float, seed: int
) -> dict[str, Any]:
    """Run ``vllm bench serve`` once, in this process.

    Args:
        server: What is asked.
        tokenizer: Of the client.
        load: Of each request.
        requests: How many.
        rate: Of requests a second, infinite for all at once.
        seed: Of their times, texts and images.

    Returns:
        What it would write to its result file.

    Raises:
        RuntimeError: The server died, or what it did is not what was asked of it.
    """
    where = ["--host", HOST, "--port", str(server.port)]
    where += ["--model", server.model, "--tokenizer", str(tokenizer)]
    with demo.quiet():
        from vllm.benchmarks import serve
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        serve.add_cli_args(parser)
        args = parser.parse_args([*where, *load.options(requests, rate, seed)])
        found: dict[str, Any] = serve.main(args)
    # It has set apart what is there, the requests among it.
    gc.unfreeze()
    if not server.is_alive():
        raise server.failed("died")
    if not found["completed"]:
        errors = [error.strip() for error in found["errors"] if error.strip()]
        reason = errors[0].splitlines()[-1] if errors else "no reason given"
        raise server.failed(f"answered no request: {reason}")
    check(found, load, requests, rate)
    if server.hits():
        raise RuntimeError(f"the {server.name} server found requests in its caches")
    return found


def check(found: Mapping[str, Any], load: Load, requests: int, rate: float) -> None:
    """Compare what the client saw with what it was to offer.

    Args:
        found: As ``offer`` returns it.
        load: Of each request.
        requests: How many were to be offered.
        rate: How many a second.

    Raises:
        RuntimeError: Images or tokens are missing.
        ClientIsLateError: The last requests came later than they should have.
    """
    if found["completed"] + found["failed"] != requests or not found["completed"]:
        raise RuntimeError(f"{found['completed']} of {requests} requests answered")
    done = np.flatnonzero(found["output_lens"])
    outputs = np.asarray(found["output_lens"])[done]
    if len(done) != found["completed"] or np.any(outputs != load.outputs):
        raise RuntimeError(f"answers are not of {load.outputs} tokens: {outputs}")
    # The text is shorter than an image.
    images = np.asarray(found["input_lens"])[done] // IMAGE_TOKENS
    if images.min() < load.fewest or images.max() > load.most:
        raise RuntimeError(f"prompts have {images.min()} to {images.max()} images")
    late = float(np.ptp(found["start_times"])) - requests / rate
    if math.isfinite(rate) and late > 0.05 * requests / rate:
        raise ClientIsLateError(f"{late:.1f} s late at {rate:g} requests a second")


_COPIED = (
    *("completed", "failed", "request_throughput", "output_throughput"),
    *("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms"),
    *("median_e2el_ms", "p99_e2el_ms"),
)


def summary(found: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """Return a run's record, without what it ran on.

    Args:
        found: As ``offer`` returns it.
        rate: Of requests a second.
    """
    done = np.flatnonzero(found["output_lens"])
    starts, latencies, ttfts = (
        np.asarray(found[name])[done] for name in ("start_times", "latencies", "ttfts")
    )
    record = {"rate": rate if math.isfinite(rate) else None}
    record |= {"seconds": found["duration"], **{key: found[key] for key in _COPIED}}
    if math.isfinite(rate):
        record["pace"] = pace(starts, latencies)
    samples = {"ttfts": ttfts, "latencies": latencies, "starts": starts}
    return record | {name: each.tolist() for name, each in samples.items()}


def measure(
    asked: Sequence[Server],
    rates: Sequence[float] | None,
    first: float,
    requests: Callable[[float], int],
    run: Callable[[Server, int, float, int], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Offer rates to servers by turns; yield a record of each run.

    Args:
        asked: The servers.
        rates: Requests a second, infinite for all at once. Without them ``first`` and
            its doubles until every server was saturated by one, or until the client is
            late, and then all at once.
        first: See there.
        requests: How many, by their rate. All at once there are as many as the server
            that can take least is given at the highest rate that it has reached.
        run: Offers a server so many requests at a rate, by a seed.

    Raises:
        ClientIsLateError: It could not send at one of ``rates``.
    """
    reached = {server.name: first for server in asked}
    over: set[str] = set()
    shortest: dict[str, float] = {}

    def rising() -> Iterator[float]:
        for power in itertools.count():
            yield first * 2**power
            if len(over) == len(asked):
                break
        yield math.inf

    for seed, rate in enumerate(rates or rising(), 1):
        count = requests(min(rate, *reached.values()) if math.isinf(rate) else rate)
        records: list[dict[str, Any]] = []
        try:
            # One that is saturated can only be asked for all at once.
            able = [s for s in asked if rates or s.name not in over or rate == math.inf]
            for server in able[:: 1 if seed % 2 else -1]:
                record = summary(run(server, count, rate, seed), rate)
                more = {"tree": server.name, "attention": server.attention}
                records.append(more | record)
        except ClientIsLateError as error:
            if rates:
                raise
            print(f"the client could not: {error}", flush=True)
            over.update(reached)
            continue
        for record in records:
            name, throughput = record["tree"], record["request_throughput"]
            reached[name] = max(reached[name], throughput)
        if math.isfinite(rate):
            for record in records:
                name, wait = record["tree"], record["median_ttft_ms"]
                shortest[name] = min(wait, shortest.get(name, math.inf))
            for record in records:
                record["saturated"] = saturated(record, max(shortest.values()))
                if record["saturated"]:
                    over.add(record["tree"])
        yield from records


def server_options(
    checkpoint: str, api_servers: int, cuda: bool, kv_gib: int = 0
) -> list[str]:
    """Return the options of ``vllm serve``, the model first.

    Args:
        checkpoint: The model's folder.
        api_servers: Its processes that speak HTTP and prepare images: one alone would
            be what saturates, in any tree.
        cuda: Whether there is a GPU.
        kv_gib: GiB of KV cache on it.
    """
    limits = {"image": MOST_IMAGES, "video": 0, "audio": 0}
    options = [
        *(checkpoint, "--load-format", "dummy", "--dtype", "bfloat16"),
        *("--max-model-len", "4096", "--limit-mm-per-prompt", json.dumps(limits)),
        # What is measured must not be remembered.
        *("--no-enable-prefix-caching", "--generation-config", "vllm"),
        *("--api-server-count", str(api_servers), "--disable-uvicorn-access-log"),
        *("--worker-extension-cls", "scripts.bench_rates.Extension"),
    ]
    if not cuda:
        return [*options, "--enforce-eager"]
    # The other servers use the GPU, too: free memory says nothing.
    memory = ["--kv-cache-memory-bytes", str(kv_gib << 30)]
    memory += ["--gpu-memory-utilization", "0.1"]
    # Fewer graphs start sooner.
    sizes = [1 << i for i in range(MOST_AT_ONCE.bit_length())]
    graphs = json.dumps({"cudagraph_capture_sizes": sizes})
    most = ["--max-num-seqs", str(MOST_AT_ONCE), "--compilation-config", graphs]
    return [*options, *memory, *most]


def room(kind: str, layers: int, servers: int, gigabytes: float) -> int:
    """GiB of KV cache that each of so many servers of a GPU can have, 32 at most.

    Args:
        kind: A key of ``real_gemma4.TEXTS``.
        layers: Of its language model.
        servers: That share the GPU.
        gigabytes: Its memory, in 1e9.
    """
    left = 0.94 * gigabytes / servers - real_gemma4.gigabytes(kind, layers) - 4.5
    return max(4, min(int(left * 1e9 / 2**30), 32))


def same_answers(asked: Sequence[Server], load: Load) -> dict[str, dict[str, Any]]:
    """Ask all servers the same, one request at a time; hold them against the first.

    Returns:
        The agreement of each by its name, the first one's of what it says twice.
    """
    first = asked[0]

    def answers(server: Server) -> list[list[int]]:
        return [server.answer(i, load.most, load.outputs) for i in range(ANSWERS)]

    expected = answers(first)
    found = {}
    for server in asked:
        same = agreement(answers(server), expected)
        found[server.name] = {**same, "with": first.name}
        server.asked_again = server.hits()
    return found


def _rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def _line(record: Mapping[str, Any]) -> str:
    rate = "at once" if record["rate"] is None else f"{record['rate']:g}"
    done = f"{record['completed']}/{record['completed'] + record['failed']}"
    return (
        f"{rate:>8} {record['tree']:<9} {done:>9} {record['seconds']:>7.1f}"
        f" {record['request_throughput']:>9.2f} {record['output_throughput']:>9.1f}"
        f" {record['median_ttft_ms']:>8.0f} {record['p99_ttft_ms']:>8.0f}"
        f" {record['median_tpot_ms']:>8.1f}"
        f"{'  saturated' if record.get('saturated') else ''}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its table; return the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Requests to servers of this machine need no proxy.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = HOST
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_rates", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kind", choices=sorted(real_gemma4.TEXTS), default="26b")
    help = "of the language model (default: 12, 1 on CPU)"
    parser.add_argument("--layers", type=int, help=help)
    help = "what a request has"
    parser.add_argument(
        "--workload", choices=list(WORKLOADS), default=next(iter(WORKLOADS)), help=help
    )
    help = f"of {', '.join(FORMS)} (default: release,patched)"
    parser.add_argument("--forms", default="release,patched", help=help)
    help = "requests a second, inf for all at once (default: doubles until saturated)"
    parser.add_argument("--rates", type=_rates, help=help)
    help = "for which a rate is offered (default: 10, 4 on CPU)"
    parser.add_argument("--seconds", type=float, help=help)
    help = "at least, at any rate (default: 16, 3 on CPU)"
    parser.add_argument("--requests", type=int, help=help)
    help = "divide texts and answers by this (default: 1, 16 on CPU)"
    parser.add_argument("--shrink", type=int, help=help)
    help = "processes of a server that speak HTTP (default: a quarter of the cores, 8"
    help += " at most, 1 on CPU)"
    parser.add_argument("--api-servers", type=int, help=help)
    help = "a folder with a model, in the place of one of KIND"
    parser.add_argument("--checkpoint", type=Path, help=help)
    parser.add_argument("--json", type=Path, help="append the records to this file")
    args = parser.parse_args(argv)
    forms = args.forms.split(",")
    if unknown := set(forms) - set(FORMS):
        parser.error(f"there is no {', '.join(sorted(unknown))}")

    import torch

    cuda = torch.cuda.is_available()
    seconds = args.seconds or (10 if cuda else 4)
    least = args.requests or (16 if cuda else 3)
    if least < 3:
        parser.error("--requests: fewer than 3 have no rate")
    cores = len(os.sched_getaffinity(0))
    api_servers = args.api_servers or (min(max(cores // 4, 1), 8) if cuda else 1)
    load = WORKLOADS[args.workload]
    shrink = args.shrink or (1 if cuda else 16)
    load = dataclasses.replace(
        load, inputs=load.inputs // shrink, outputs=load.outputs // shrink
    )

    def requests(rate: float) -> int:
        return max(least, math.ceil(rate * seconds))

    def run(server: Server, count: int, rate: float, seed: int) -> dict[str, Any]:
        return offer(server, tokenizer, load, count, rate, seed)

    try:
        layers, kv_gib = args.layers or 1, 0
        if cuda:
            gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
            if not args.layers:
                layers = fitting(args.kind, 12, len(forms), gigabytes)
            kv_gib = room(args.kind, layers, len(forms), gigabytes)
        checkpoint = args.checkpoint or write_model(args.kind, layers, cuda)
        text = json.loads((checkpoint / "config.json").read_text())["text_config"]
        about = {
            "kind": args.checkpoint.name if args.checkpoint else args.kind,
            "layers": text["num_hidden_layers"],
            "workload": args.workload,
            "kv_gib": kv_gib,
        }
        options = server_options(str(checkpoint), api_servers, cuda, kv_gib)
        with (
            tempfile.TemporaryDirectory() as folder,
            servers(forms, options) as asked,
        ):
            tokenizer = real_gemma4.write_tokenizer(Path(folder))
            first = 2.0 if cuda else 0.25
            for server in asked:
                # What is compiled when it is first needed, of large batches and small.
                run(server, MOST_AT_ONCE if cuda else least, math.inf, 0)
                if cuda:
                    with contextlib.suppress(ClientIsLateError):
                        run(server, least, 2 * first, 1000)
            same = same_answers(asked, load)
            print("\n{kind}, {layers} layers, {workload}\n".format(**about))
            print(
                f"{'offered':>8} {'tree':<9} {'answered':>9} {'seconds':>7}"
                f" {'answers/s':>9} {'tokens/s':>9} {'TTFT ms':>8} {'p99':>8}"
                f" {'TPOT ms':>8}",
                flush=True,
            )
            for record in measure(asked, args.rates, first, requests, run):
                print(_line(record), flush=True)
                agreed = {"agreement": same[record["tree"]]}
                worker.keep(args.json, about | record | agreed)
    except (OSError, RuntimeError) as error:
        print(f"bench_rates: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
