"""Pictures from a prompt, on the command line.

python -m snoopi.generate MODEL "prompt" [--negative TEXT] --out FILE.png
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from snoopi import errors

if __name__ == "__main__":
    errors.leave_on_signals("snoopi.generate")  # the imports below take seconds
    gc.disable()  # they make a million objects that stay: looking through them takes 0.15 s

import torch

from snoopi import arguments
from snoopi.folders import read_spec, shipped_or_path
from snoopi.pictures import save_png
from snoopi.pipeline import MODES, Pipeline, load
from snoopi.tiles import check_tile
from snoopi.tokenize import PromptCut

if __name__ == "__main__":
    gc.freeze()
    gc.enable()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 for a user's mistake, 130 or 143 when stopped."""
    options = _parser().parse_intermixed_args(arguments)
    return errors.status("snoopi.generate", lambda: _generate(options))


def _generate(options: argparse.Namespace) -> None:
    if options.out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {options.out}")
    if options.out.is_dir():
        raise ValueError(f"--out must be a file, got the folder {options.out}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device")
    size = arguments.size(options.size)
    check_tile(options.tile)
    pipeline = load(
        shipped_or_path(options.model),
        options.device,
        arguments.DTYPES.get(options.dtype or ""),
        options.optimize,
        vae=None if options.vae is None else shipped_or_path(options.vae),
    )
    _warn_about_words(pipeline, [options.prompt, options.negative or ""])
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCut)  # said above, on one line
        pictures = pipeline(
            options.prompt,
            options.negative,
            guidance=options.guidance,
            scale=options.scale,
            steps=options.steps,
            seed=options.seed,
            num=options.num,
            size=size,
            tile=options.tile,
        )
    seconds = time.monotonic() - started
    for path, picture in zip(_names(options.out, options.num), pictures, strict=True):
        save_png(picture, path)
        print(f"wrote {path} ({picture.width}x{picture.height})")
    print(f"{len(pictures)} in {seconds:.2f} s")
    if source := read_spec(shipped_or_path(options.model))[1].get("pictures"):
        print(f"trained on {source}")  # whoever passes the pictures on must say so, too


def _warn_about_words(pipeline: Pipeline, texts: Sequence[str]) -> None:
    """Say which words are not read as such: unknown to a small vocabulary, or after the last token.

    Two tokenizers may say the same; it is printed once.
    """
    lines: list[str | None] = []
    for spec, tokenizer in zip(pipeline.spec.text, pipeline.tokenizers, strict=True):
        if tokenizer is not None:
            prompts = [spec.prepare(text) for text in texts]
            if words := [w for prompt in prompts for w in tokenizer.unknown(prompt)]:
                lines.append(f"not in the vocabulary: {', '.join(words)}")
            lines += map(tokenizer.cut, prompts)
    for line in dict.fromkeys(filter(None, lines)):
        print(f"snoopi.generate: {line}", file=sys.stderr)


def _names(out: Path, num: int) -> list[Path]:
    """FILE.png, or FILE-0.png, FILE-1.png, ... of several."""
    return [out] if num == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(num)]


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog="snoopi.generate",
        description="Pictures from a prompt.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="a model folder, such as runs/pgsb_shapes/model")
    add("prompt", help="what to draw")
    add("--negative", metavar="TEXT", help="what to steer away from")
    add("--guidance", choices=MODES, default="nasa", help="how the negative is used")
    add(
        "--scale",
        type=arguments.scale,
        metavar="S[,S...]",
        help="strength of the guidance, or one per step; None: the model's default",
    )
    add("--steps", type=int, help="sampler steps; None: one for a one-step model")
    add("--seed", type=int, default=0, help="seed of the starting noise")
    add("--num", type=int, default=1, metavar="K", help="number of pictures")
    add("--size", metavar="HxW", help="size in pixels; None: the model's")
    add("--tile", type=int, metavar="N", help="decode in tiles of N latent pixels; None: whole")
    add("--vae", metavar="FOLDER", help="take the VAE of another model folder, or TAESD's")
    add("--dtype", choices=list(arguments.DTYPES), help="compute type; None: as stored")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    add("--optimize", choices=("auto", "none"), default="auto", help="pack weights for speed")
    add("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
