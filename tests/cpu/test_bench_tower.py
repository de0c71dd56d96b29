# SPDX-License-Identifier: Apache-2.0
"""The tower's benchmark: what it writes is measured, of what it says, and right."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from scripts import (
    bench_encoder,
    bench_peers,
    bench_tower,
    demo,
    real_gemma4,
    tiny_gemma4,
    worker,
)

TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
FORMS = ["eager", "hf-sdpa", "triton", "fa3"]
Records = list[dict[str, Any]]
Run = Callable[..., tuple[int, Records]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Records]]:
    """A way to run the benchmark on one small layer, and the records of a run.

    The processes of that run are those of all others.
    """
    if torch.cuda.is_available():
        pytest.skip("a GPU has other forms, and rounds to half precision")
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setitem(real_gemma4.TOWERS, "26b", TINY)
        patch.setattr(bench_tower, "CACHE", folder)
        patch.setattr(bench_tower, "CPU_FORMS", FORMS)
        found: dict[str, str] = {}
        processes: dict[str, worker.Process] = {}
        start = worker.engines

        @contextlib.contextmanager
        def engines(
            module: str, arguments: dict[str, list[str]], failures: dict[str, str]
        ) -> Iterator[dict[str, worker.Process]]:
            if not processes:
                # More images than a run with the batches alone needs.
                for given in arguments.values():
                    given[given.index("--images") + 1] = "4"
                made = stack.enter_context(start(module, arguments, found))
                processes.update(made)
            failures |= {name: found[name] for name in arguments if name in found}
            yield {n: processes[n] for n in arguments if n in processes}

        patch.setattr(worker, "engines", engines)

        def main(*arguments: str) -> tuple[int, Records]:
            out = folder / "out.jsonl"
            out.unlink(missing_ok=True)
            given = ["--layers", "1", "--json", str(out), *arguments]
            status = bench_tower.main(given)
            lines = out.read_text().splitlines() if out.exists() else []
            return status, [json.loads(line) for line in lines]

        status, records = main("--batch", "1 x 280", "--batch", "32 x 70 video")
        assert status == 0
        yield main, records


@pytest.fixture
def run(bench: tuple[Run, Records]) -> Run:
    return bench[0]


@pytest.fixture
def batches(bench: tuple[Run, Records]) -> Records:
    return bench[1]


@pytest.mark.slow
def test_records(batches: Records) -> None:
    assert [r for r in batches if "skipped" in r] == [
        {
            "kind": "26b",
            "tree": "triton",
            "skipped": "vLLM has TORCH_SDPA for vision towers here",
        },
        {"kind": "26b", "tree": "fa3", "skipped": "takes 1 GPU, there are none"},
    ]
    measured = [r for r in batches if "skipped" not in r]
    assert [
        (r["batch"], r["tree"], r["items"], r["soft_tokens"]) for r in measured
    ] == [
        (*batch[:1], tree, *batch[1:])
        for batch in (("1 x 280", 1, 272), ("32 x 70 video", 1, 32 * 70))
        for tree in ("unpatched", "eager", "hf-sdpa")
    ]
    for record in measured:
        about = {"kind": "26b", "layers": 1, "dtype": "float32", "device": "cpu"}
        assert about.items() <= record.items()
        assert record["checked_items"] == record["items"]
        assert len(record["samples"]) == 3
        low, high = record["quartiles"]
        assert min(record["samples"]) <= low <= record["median"] <= high
        assert 0 <= record["mib"] < record["peak_mib"]
        # Float32 rounds: not nothing, not much.
        assert 0 < record["error"] < 1e-4
        assert 0 < record["max_error"] < 1e-3
    assert {r.get("attention") for r in measured if r["tree"] == "eager"} == {
        "TORCH_SDPA"
    }


@pytest.mark.slow
def test_it_ran(
    batches: Records, record_property: Callable[[str, object], None]
) -> None:
    """How fast this machine is does not fail a test, but the ratio is reported."""
    medians = {r["tree"]: r["median"] for r in batches if r.get("batch") == "1 x 280"}
    ratio = medians["unpatched"] / medians["eager"]
    record_property("times as fast as the release", ratio)
    print(f"the patched tower is {ratio:.2f} times as fast as the release's")
    assert ratio > 0


@pytest.mark.slow
def test_scale(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tower, "SCALE_CHECKED", 2)
    monkeypatch.setitem(bench_encoder.SCALES, "soft_tokens", ((), (70, 140)))
    given = ("--scale", "images,soft_tokens")
    status, records = run(*given, "--forms", "eager", "--repeat", "2")
    assert status == 0
    for tree in ("unpatched", "eager"):
        found = [record for record in records if record["tree"] == tree]
        assert [(r["axis"], r["x"], r["soft_tokens"]) for r in found] == [
            *(("images", 1, 266), ("images", 2, 532), ("images", 4, 1064)),
            *(("soft_tokens", 70, 63), ("soft_tokens", 140, 130)),
        ]
        for record in found:
            assert record["layers"] == 1 and len(record["samples"]) == 2
            assert record["checked_items"] == min(record["items"], 2)
            assert 0 < record["error"] < 1e-4


@pytest.mark.slow
def test_reference_that_is_off(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    load = bench_tower.load

    def wrong(path: Path) -> list[np.ndarray]:
        factor = 1.01 if path.stem == bench_peers.REFERENCE else 1
        return [factor * item for item in load(path)]

    monkeypatch.setattr(bench_tower, "load", wrong)
    given = ("--batch", "1 x 280", "--repeat", "1", "--forms", "eager,hf-sdpa")
    status, records = run(*given)
    assert status == 0 and len(records) == 3
    for record in records:
        assert record["error"] == pytest.approx(0.01, rel=0.02)


class Fake:
    """Answers like a process: an item of two soft tokens, of ones."""

    def __init__(self, value: float = 1.0, **changes: Any) -> None:
        self.features = np.full((2, 3), value, np.float32)
        self.seconds, self.digest, self.dies_at = 1.0, 7, ""
        self.__dict__ |= changes
        self.asked: list[str] = []

    def __call__(self, method: str, *given: Any) -> dict[str, Any]:
        self.asked.append(method)
        if method == self.dies_at:
            text = "an engine died, its log is above: out of luck\nfor good"
            raise RuntimeError(text)
        if method == "run":
            return {"seconds": self.seconds, "mib": 1.0, "peak_mib": 2.0}
        np.savez(given[1], self.features)
        return {"lengths": [len(self.features)], "digest": self.digest}

    def stop(self) -> None:
        self.asked.append("stop")


def fakes(**changes: Fake) -> dict[str, Fake]:
    names = ("unpatched", "compiled", "hf-sdpa", bench_peers.REFERENCE)
    return {name: Fake() for name in names} | changes


def measure(group: bench_tower.Group, folder: Path, **changes: Any) -> Records:
    given: dict[str, Any] = {"least": 2, "most": 4, "seconds": 2.5, "checked": 8}
    return bench_tower.measure(group, "1 x 280", folder, **given | changes)


def test_turns(tmp_path: Path) -> None:
    """All run so often, but what takes long no more than it must."""
    found = fakes(unpatched=Fake(seconds=5.0), compiled=Fake(1.5, seconds=0.5))
    records = measure(bench_tower.Group(found), tmp_path)  # type: ignore[arg-type]
    assert {r["tree"]: len(r["samples"]) for r in records} == {
        "unpatched": 2,
        "compiled": 4,
        "hf-sdpa": 3,
    }
    assert found[bench_peers.REFERENCE].asked == ["prepare"]
    assert {r["tree"]: (r["error"], r["max_error"]) for r in records} == {
        "unpatched": (0.0, 0.0),
        "compiled": (0.5, 0.5),
        "hf-sdpa": (0.0, 0.0),
    }


@pytest.mark.parametrize("method", ["prepare", "run"])
def test_process_that_ends(tmp_path: Path, method: str) -> None:
    """The others go on, and every batch says that it has ended."""
    found = fakes(compiled=Fake(dies_at=method))
    group = bench_tower.Group(found)  # type: ignore[arg-type]
    for said in ("out of luck", "ended before: out of luck"):
        records = {record["tree"]: record for record in measure(group, tmp_path)}
        assert records.keys() == {"unpatched", "compiled", "hf-sdpa"}
        assert records["compiled"] == {"tree": "compiled", "skipped": said}
        assert records["unpatched"]["median"] == 1.0


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("unpatched", "prepare"),
        ("unpatched", "run"),
        ("eager", "prepare"),
        ("eager", "run"),
        (bench_peers.REFERENCE, "prepare"),
    ],
)
def test_nothing_without_these(tmp_path: Path, name: str, method: str) -> None:
    group = bench_tower.Group(fakes(**{name: Fake(dies_at=method)}))  # type: ignore
    with pytest.raises(RuntimeError, match="out of luck"):
        measure(group, tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"digest": 8}, "digest of compiled 8, not 7"),
        ({"features": np.ones((4, 3))}, r"lengths of compiled \[4\], not \[2\]"),
    ],
)
def test_other_inputs(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    group = bench_tower.Group(fakes(compiled=Fake(**change)))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=text):
        measure(group, tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"features": np.ones((2, 4))}, r"features are \[\(2, 4\)\], the reference"),
        ({"value": np.nan}, "not finite"),
    ],
)
def test_what_cannot_be_compared(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    """The others' measurements are kept, unless there is none to compare with."""
    group = bench_tower.Group(fakes(compiled=Fake(**change)))  # type: ignore[arg-type]
    records = {record["tree"]: record for record in measure(group, tmp_path)}
    assert re.search(text, records["compiled"]["skipped"])
    assert all("median" in records[name] for name in ("unpatched", "hf-sdpa"))
    group = bench_tower.Group(fakes(eager=Fake(**change)))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=text):
        measure(group, tmp_path)


def test_reference_of_nothing() -> None:
    zeros = [np.zeros((2, 3))]
    with pytest.raises(RuntimeError, match="the reference is zero"):
        bench_tower.errors(zeros, zeros)


def test_batch_too_large_for_a_peer(tmp_path: Path) -> None:
    class Full(Fake):
        def __call__(self, method: str, *given: Any) -> dict[str, Any]:
            assert method == "prepare"
            return {"skipped": "out of memory"}

    found = fakes(**{"hf-sdpa": Full()})
    records = measure(bench_tower.Group(found), tmp_path)  # type: ignore[arg-type]
    assert {"tree": "hf-sdpa", "skipped": "out of memory"} in records
    assert sorted(r["tree"] for r in records if "median" in r) == [
        "compiled",
        "unpatched",
    ]


@pytest.mark.parametrize("name", ["images 9", "8 x 280", "8 x 280 mixed"])
def test_no_image_is_like_another(name: str) -> None:
    images = bench_encoder.example(name).images
    assert (
        len({image.tobytes() for image in images})
        == len(images)
        == int(name.removeprefix("images ").split()[0])
    )
    assert len(images) == bench_encoder.images_of(name)


@pytest.mark.parametrize(
    ("items", "most", "found"),
    [
        (1, 4, [0]),
        (3, 4, [0, 1, 2]),
        (256, 4, [0, 85, 170, 255]),
        (8, 9**9, [*range(8)]),
    ],
)
def test_checked_items(items: int, most: int, found: list[int]) -> None:
    assert bench_encoder.checked_items(items, most) == found


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bench_peers.Peer]:
    """All of Hugging Face, on a kernel for FlashAttention that needs no GPU."""
    path = tmp_path_factory.mktemp("peers") / "26b"
    tiny_gemma4.build(path, "26b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_peers, "_vllm_varlen", lambda head_size: plain_varlen)
        names = (*bench_peers.PEERS, bench_peers.REFERENCE)
        return {name: bench_peers.Peer(path, "float32", name) for name in names}


def plain_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: Any
) -> torch.Tensor:
    """What vLLM's ``flash_attn_varlen_func`` is given, and returns."""
    starts = more["cu_seqlens_q"]
    assert starts.dtype == torch.int32 and starts.equal(more["cu_seqlens_k"])
    lengths = starts.diff()
    assert more["max_seqlen_q"] == more["max_seqlen_k"] == int(lengths.max())
    assert starts[-1] == len(query) and not more["causal"]
    outputs = []
    for parts in zip(
        *(x.split(lengths.tolist()) for x in (query, key, value)), strict=True
    ):
        q, k, v = (part.transpose(0, 1) for part in parts)
        weights = (more["softmax_scale"] * q @ k.mT).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


def inputs(folder: Path, *sizes: tuple[int, int], frames: int = 0) -> str:
    """The file that an engine writes, of images of these widths and heights."""
    from transformers.models.gemma4 import Gemma4ImageProcessor

    process = Gemma4ImageProcessor(do_normalize=False, max_soft_tokens=70)
    pictures = [demo.picture(*size, seed=i) for i, size in enumerate(sizes)]
    found = process(images=pictures, return_tensors="pt")
    given = {
        "pixels": list(found["pixel_values"]),
        "positions": list(found["image_position_ids"]),
        "counts": [frames] if frames else [1] * len(sizes),
        "video": bool(frames),
    }
    torch.save(given, folder / "inputs.pt")
    return str(folder / "inputs.pt")


@pytest.mark.parametrize(
    ("sizes", "frames", "lengths"),
    [
        # Padded differently, without padding, and a video of two frames.
        ([(400, 300), (200, 600)], 0, [63, 56]),
        ([(480, 336), (336, 480)], 0, [70, 70]),
        ([(400, 300), (400, 300)], 2, [126]),
    ],
)
def test_peers_agree(
    peers: dict[str, bench_peers.Peer],
    tmp_path: Path,
    sizes: list[tuple[int, int]],
    frames: int,
    lengths: list[int],
) -> None:
    given, features = inputs(tmp_path, *sizes, frames=frames), {}
    for name, peer in peers.items():
        out = tmp_path / f"{name}.npz"
        assert peer.prepare(given, str(out)) == {"lengths": lengths}
        features[name] = bench_tower.load(out)
        assert peer.run()["seconds"] > 0
    reference = features.pop(bench_peers.REFERENCE)
    for found in features.values():
        assert bench_tower.errors(found, reference)["error"] < 1e-5


def test_peer_without_memory(
    peers: dict[str, bench_peers.Peer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA is full\nof it")

    peer = peers["hf-sdpa"]
    monkeypatch.setattr(peer.model, "get_image_features", full)
    given = inputs(tmp_path, (400, 300))
    assert peer.prepare(given, str(tmp_path / "out.npz")) == {
        "skipped": "out of memory: CUDA is full"
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_flash_attention_takes_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="takes a GPU"):
        bench_peers._vllm_varlen(72)


def encoder(form: str, *layers: tuple[str, int | None]) -> bench_encoder.Encoder:
    """Of a worker whose tower has these backends and versions of FlashAttention."""
    parts = [
        SimpleNamespace(attn_backend=SimpleNamespace(name=name), _fa_version=version)
        for name, version in layers
    ]
    attention = [SimpleNamespace(self_attn=SimpleNamespace(attn=p)) for p in parts]
    tower = SimpleNamespace(encoder=SimpleNamespace(layers=attention))
    model = SimpleNamespace(vision_tower=tower)
    return bench_encoder.Encoder(SimpleNamespace(get_model=lambda: model), form)


@pytest.mark.parametrize(
    ("form", "layers"),
    [
        ("fa4", [("FLASH_ATTN", 3)] * 2),
        ("fa3", [("FLASH_ATTN", None)] * 2),
        ("triton", [("FLASH_ATTN", 3)] * 2),
        ("triton", [("TRITON_ATTN", None), ("TORCH_SDPA", None)]),
        ("eager", [("FLASH_ATTN", 3), ("FLASH_ATTN", 2)]),
    ],
)
def test_layers_of_another_backend(
    form: str, layers: list[tuple[str, int | None]]
) -> None:
    with pytest.raises(RuntimeError, match=f"not as in {form}"):
        encoder(form, *layers)


@pytest.mark.parametrize(
    ("backend", "versions", "right"),
    [
        (("FLASH_ATTN", 3), [3, 3], True),
        (("FLASH_ATTN", 3), [3, 2], False),
        (("FLASH_ATTN", 3), [None, None], False),
        (("TORCH_SDPA", None), [None] * 4, True),
        (("TORCH_SDPA", None), [None] * 3, False),
        (("TORCH_SDPA", None), [], False),
    ],
)
def test_layers_that_call_another_kernel(
    monkeypatch: pytest.MonkeyPatch,
    backend: tuple[str, int | None],
    versions: list[int | None],
    right: bool,
) -> None:
    where, name = bench_encoder.KERNEL_CALLS[backend[0]]
    module = importlib.import_module(where)
    # Where there is no GPU vLLM has no such function.
    monkeypatch.setattr(module, name, lambda **_: None, raising=False)
    watched = encoder("eager", backend, backend)._watched()
    wrong = pytest.raises(RuntimeError, match="2 layers of")
    with contextlib.nullcontext() if right else wrong, watched:
        for version in versions:
            more = {} if version is None else {"fa_version": version}
            getattr(module, name)(**more)


def test_forms_have_one_name_each() -> None:
    forms = bench_encoder.FORMS | bench_peers.PEERS
    assert len(forms) == len(bench_encoder.FORMS) + len(bench_peers.PEERS)
    used = {*bench_tower.GPU_FORMS, *bench_tower.CPU_FORMS, *bench_tower.SCALE_FORMS}
    assert used | bench_tower.NEED_GPUS.keys() <= forms.keys()
