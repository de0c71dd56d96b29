# SPDX-License-Identifier: Apache-2.0
"""Patched vLLM answers text, images and a video on tiny Gemma4 checkpoints.

Greedy tokens come from vLLM's ``LLM`` on the tree that is importable; the vision
features that its engine computed on the way are compared with Hugging Face's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1e-3
VIDEO_SOFT_TOKENS = 70  # of a frame, by vLLM and Hugging Face alike


@dataclasses.dataclass
class Example:
    """One request: a prompt and what its placeholders stand for.

    ``images`` are uint8 arrays [height, width, 3], ``video`` is one uint8 array
    [frames, height, width, 3] at two frames a second.
    """

    name: str
    text: str
    images: Sequence[np.ndarray] = ()
    video: np.ndarray | None = None
    max_soft_tokens: int | None = None

    @property
    def prompt(self) -> str:
        """The prompt in the chat template's form, one placeholder an item."""
        items = "<|image|>" * len(self.images)
        items += "<|video|>" if self.video is not None else ""
        return f"<bos><|turn>user\n{items}{self.text}<turn|>\n<|turn>model\n"

    def request(self) -> dict[str, Any]:
        """The prompt as ``LLM.generate`` takes it."""
        from PIL import Image

        data: dict[str, Any] = {}
        if self.images:
            data["image"] = [Image.fromarray(image) for image in self.images]
        if self.video is not None:
            frames = len(self.video)
            metadata = {
                "fps": 2.0,
                "duration": frames / 2.0,
                "total_num_frames": frames,
                "frames_indices": list(range(frames)),
                "video_backend": "opencv",
                "do_sample_frames": False,
            }
            data["video"] = [(self.video, metadata)]
        request: dict[str, Any] = {"prompt": self.prompt}
        if data:
            request["multi_modal_data"] = data
        if self.max_soft_tokens is not None:
            request["mm_processor_kwargs"] = {"max_soft_tokens": self.max_soft_tokens}
        return request


def picture(width: int, height: int, seed: int) -> np.ndarray:
    """A uint8 image [height, width, 3]: gradients, blocks and a little noise.

    It is not symmetric: turned or with x and y swapped it is another picture.
    """
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack(
        [
            255 * x / width,
            255 * y / height,
            127 + 127 * np.sin(6 * x / width + 11 * y / height + seed),
        ],
        axis=-1,
    )
    for _ in range(6):
        top, left = random.integers(0, height), random.integers(0, width)
        block = (slice(top, top + height // 3), slice(left, left + width // 4))
        image[block] = random.uniform(0, 255, 3)
    image += random.normal(0, 12, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def moving_picture(frames: int, width: int, height: int, seed: int) -> np.ndarray:
    """A uint8 video [frames, height, width, 3] whose picture moves to the right."""
    still = picture(width, height, seed)
    step = max(1, width // (2 * frames))
    return np.stack([np.roll(still, step * i, axis=1) for i in range(frames)])


def examples() -> list[Example]:
    """Text, one image, two images of unlike sizes, and a short video."""
    return [
        Example("text", "the user and the model"),
        Example("one image", "the image", [picture(400, 300, seed=1)]),
        Example(
            "two images",
            "the image and the other",
            [picture(640, 200, seed=2), picture(150, 390, seed=3)],
        ),
        Example("video", "the moving", video=moving_picture(4, 320, 180, seed=4)),
    ]


def engine_arguments(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of ``LLM`` for a tiny checkpoint: eager, small, deterministic."""
    return {
        "model": str(checkpoint),
        "dtype": "float32",
        "seed": 0,
        "enforce_eager": True,
        "max_model_len": 8192,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {"image": 4, "video": 1},
    } | changes


def record_features(llm: Any) -> list[list[Any]]:
    """Record what the engine's own model makes of images and frames from now on.

    The model must be in this process. Each call of ``embed_multimodal`` appends one
    list: a float tensor [soft tokens, text hidden] for each image or whole video.
    """
    calls: list[list[Any]] = []

    def wrap(model: Any) -> None:
        embed = model.embed_multimodal

        def embed_multimodal(**kwargs: Any) -> Any:
            features = embed(**kwargs)
            calls.append([item.detach().float().cpu() for item in features])
            return features

        model.embed_multimodal = embed_multimodal

    llm.apply_model(wrap)
    return calls


def reference_features(model: Any, processor: Any, example: Example) -> list[Any]:
    """Hugging Face's features of ``example``: one float tensor an image or frame.

    Args:
        model: Hugging Face's ``Gemma4ForConditionalGeneration``.
        processor: The checkpoint's ``Gemma4Processor``.
        example: Its images, or the frames of its video.
    """
    import torch

    frames = list(example.images) if example.video is None else list(example.video)
    soft_tokens = example.max_soft_tokens
    if example.video is not None:
        soft_tokens = VIDEO_SOFT_TOKENS
    size = {} if soft_tokens is None else {"max_soft_tokens": soft_tokens}
    features = []
    for frame in frames:
        pixels = processor.image_processor(images=[frame], return_tensors="pt", **size)
        with torch.inference_mode():
            output = model.get_image_features(
                pixels["pixel_values"].to(model.device, model.dtype),
                pixels["image_position_ids"].to(model.device),
            )
        features.append(output.pooler_output[0].float())
    return features


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what is printed below, by any library, unless there is an error."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as log:
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            yield
        except BaseException:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[1], 2)
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])


def _show(kind: str, checkpoint: Path) -> float:
    """Run one checkpoint, print what comes out; return the largest difference."""
    import torch

    print(f"{kind}: starting the engine ...", flush=True)
    start = time.perf_counter()
    with quiet():
        from transformers import AutoProcessor, Gemma4ForConditionalGeneration
        from vllm import LLM, SamplingParams

        llm = LLM(**engine_arguments(checkpoint))
        calls = record_features(llm)
        processor = AutoProcessor.from_pretrained(checkpoint)
        model = Gemma4ForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32
        )
    print(f"{kind}: ready after {time.perf_counter() - start:.0f} s", flush=True)
    worst = 0.0
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    for example in examples():
        calls.clear()
        with quiet():
            output = llm.generate(example.request(), greedy, use_tqdm=False)[0]
            references = reference_features(model, processor, example)
        answer = output.outputs[0]
        print(
            f"{kind}: {example.name}: {len(output.prompt_token_ids)} prompt tokens ->"
            f" {list(answer.token_ids)} {answer.text!r}"
        )
        found = [item for call in calls for item in call]
        if references and not found:
            raise RuntimeError(f"the engine encoded nothing for {example.name!r}")
        rows = torch.cat(found) if found else torch.empty(0, 0)
        if len(rows) != sum(map(len, references)):
            raise RuntimeError(
                f"{example.name}: {len(rows)} feature rows in vLLM,"
                f" {sum(map(len, references))} in Hugging Face"
            )
        noun = "image" if example.video is None else "frame"
        for number, reference in enumerate(references, 1):
            ours, rows = rows[: len(reference)], rows[len(reference) :]
            # A NaN would pass every comparison but this one.
            error = float((ours - reference).abs().max().nan_to_num(float("inf")))
            worst = max(worst, error)
            print(
                f"{kind}:   {noun} {number}: {len(reference)} soft tokens, features"
                f" off by {error:.1e} at most, of {float(reference.abs().max()):.2f}"
            )
    with quiet():
        del llm
    return worst


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return 0 where every feature is within the tolerance."""
    # The features are read from the engine's model, so it has to live here.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from scripts import tiny_gemma4

    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        help="keep the checkpoints in this directory (default: a temporary one)",
    )
    parser.add_argument(
        "--kind",
        choices=tiny_gemma4.KINDS,
        action="append",
        help="only this layout (default: 26b and e2b)",
    )
    args = parser.parse_args(argv)
    start = time.perf_counter()
    worst = 0.0
    with contextlib.ExitStack() as stack:
        root = args.checkpoints
        if root is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for kind in args.kind or ("26b", "e2b"):
            print(f"{kind}: building a tiny checkpoint ...", flush=True)
            try:
                with quiet():
                    checkpoint = tiny_gemma4.build(root / f"gemma4-{kind}", kind)
                worst = max(worst, _show(kind, checkpoint))
            except (OSError, RuntimeError) as error:
                print(f"demo: {kind}: {error}", file=sys.stderr)
                return 1
    seconds = time.perf_counter() - start
    if not worst <= TOLERANCE:
        print(
            f"demo: features differ by {worst:.1e} from Hugging Face's,"
            f" more than {TOLERANCE:.0e}",
            file=sys.stderr,
        )
        return 1
    print(
        f"demo: done in {seconds:.0f} s, features within {worst:.1e} of Hugging Face's"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
