"""All metrics under their names, each with its figures, how many pictures they are of, and how.

bench = Bench(found_rows(folder, prompts, None, None), tools={"inception": tool}, reference=real)
check(["fid"], bench)
results = measure(["fid"], bench)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from snoopi.evaluate import clip_score, hpsv2, pairs
from snoopi.evaluate import features as feature_files
from snoopi.evaluate.features import PROTOCOLS, Features
from snoopi.evaluate.fid import frechet_distance
from snoopi.evaluate.hpsv2 import Reading
from snoopi.evaluate.kid import SIZE, SUBSETS, kernel_distance
from snoopi.evaluate.pairs import Pair, Rate
from snoopi.evaluate.picture_sets import Row, open_picture, picture_files
from snoopi.evaluate.precision_recall import precision_recall
from snoopi.evaluate.removal import Generate, RemovalTest
from snoopi.evaluate.world import REAL_PER_PROMPT, Quality, Ruler
from snoopi.folders import Clip, defer_part, load_clip, load_tokenizer, read_tools
from snoopi.noise import Noise


class Figure(NamedTuple):
    """A number of a metric over n pictures, with its 95 % interval where one is known."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Result:
    """A metric's figures by name. protocol: how they came about, in words. details: plain data."""

    figures: dict[str, Figure]
    protocol: str
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        figures = {name: figure._asdict() for name, figure in self.figures.items()}
        plain = {"figures": figures, "protocol": self.protocol, "details": self.details}
        return {**plain, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Switches:
    """What the published protocols differ in; the defaults are the COCO-30K line's.

    pr_features: "inception" as that line, "vgg16" as Kynkaanniemi et al. bgr: precision and recall
    read channels in cv2's order. clip_first: pixels a side before CLIP's preprocessing, None: as
    they are. hps_version: of the weights, which do not say it themselves.
    """

    kid_subsets: int = SUBSETS
    kid_size: int = SIZE
    pr_features: str = "inception"
    pr_k: int = 3
    bgr: bool = False
    prefix: str = clip_score.PREFIX
    clip_first: int | None = clip_score.SIZE
    hps_version: str | None = None
    hps: Reading = Reading()  # noqa: RUF009  # frozen

    def pr_protocol(self) -> str:
        """The features that precision and recall read."""
        name = "inception-tf1" if self.pr_features == "inception" else self.pr_features
        return f"{name}-bgr" if self.bgr else name


@dataclass(frozen=True)
class WorldBench:
    """A world's own measures. ruler: of the pictures' prompts.

    For removal: draws: whether there is a model; generate: its pictures, once it is loaded; seed,
    count: of the prompts, `count` an attribute.
    """

    ruler: Ruler
    draws: bool = False
    seed: int = 0
    count: int = pairs.COUNT
    generate: Generate | None = None


@dataclass
class Bench:
    """What metrics read; what was not given is None or empty.

    rows: pictures with prompts. features: of the pictures, instead of reading them. reference: a
    folder of real pictures, or features or statistics of them. tools: folders of networks by kind
    (inception, vgg, clip, hps). benchmark: HPSv2's pictures by style. removal, pairs: pictures
    before and after, and what they are of. count: of the pictures, where they are not drawn yet.
    """

    rows: Sequence[Row] = ()
    features: Features | None = None
    reference: Path | Features | None = None
    tools: Mapping[str, Path] = field(default_factory=dict)
    benchmark: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    removal: Sequence[Row] = ()
    pairs: Sequence[Pair] = ()
    world: WorldBench | None = None
    switches: Switches = Switches()  # frozen
    cache: Path | None = None
    keep: Path | None = None  # where features of the pictures are kept
    batch: int = 32
    device: str = "cpu"
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of pictures (or of rows of their features)."""
        return self.features.count if self.features else len(self.rows)

    def generated(self, protocol: str) -> Features:
        """Features of the pictures."""
        if self.features:
            return self.features
        return self._once(f"generated {protocol}", lambda: self._extract(protocol))

    def real(self, protocol: str) -> Features:
        """Features of the reference."""
        if isinstance(self.reference, Features):
            return self.reference
        folder, tool = self.reference, self.tools[PROTOCOLS[protocol].tool]
        assert folder is not None

        def make() -> Features:
            how = (self.cache, self.batch, self.device)
            return feature_files.of_files(picture_files(folder), protocol, tool, *how)

        return self._once(f"real {protocol}", make)

    def clip(self, tool: str) -> Clip:
        """The CLIP in a folder of tools; one at a time, since they are large."""
        kept = self._made.get("clip")
        if kept is None or kept[0] != self.tools[tool]:
            self._made.pop("clip", None)
            self._made["clip"] = self.tools[tool], load_clip(self.tools[tool], self.device)
        return self._made["clip"][1]

    def quality(self) -> tuple[Quality, Tensor]:
        """What the world's judge says of the pictures, and its features of them."""
        return self._once("quality", self._judge)

    def _extract(self, protocol: str) -> Features:
        tool = self.tools[PROTOCOLS[protocol].tool]
        files = [row.file for row in self.rows]
        return feature_files.of_files(files, protocol, tool, self.keep, self.batch, self.device)

    def _judge(self) -> tuple[Quality, Tensor]:
        assert self.world is not None
        judge, parts = self.world.ruler.judge, []
        for row in self.rows:
            parts.append(_as_drawn(row.file))
            high, wide = parts[-1].shape[2:]
            if (high, wide) != (judge.size, judge.size):
                raise ValueError(f"{row.file} has {high}x{wide} pixels, not {judge.size} a side")
        pictures = torch.cat(parts)
        return self.world.ruler.judge_pictures(pictures), judge.features(pictures)

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _as_drawn(path: Path) -> Tensor:
    """A picture file as a world's: float [1 3 h w] in [-1, 1]."""
    pixels = np.array(open_picture(path).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


# --- the metrics ----------------------------------------------------------------------------------


def _fid(bench: Bench) -> Result:
    if bench.world:
        quality, features = bench.quality()
        return Result(
            {"fid": Figure(quality.frechet, quality.n)},
            f"{_judge_words(features)}, against {REAL_PER_PROMPT} real pictures of each prompt",
        )
    fake, real = bench.generated("inception"), bench.real("inception")
    value = frechet_distance(fake.stats, real.stats)
    return Result({"fid": Figure(value, fake.count)}, _words(fake, real), _against(real))


def _kid(bench: Bench) -> Result:
    how = bench.switches
    if bench.world:
        world, (_, fake) = bench.world, bench.quality()
        real, words = world.ruler.judge.features(world.ruler.real()), _judge_words(fake)
        words, details = f"{words}, against one real picture of each prompt", {}
    else:
        sets = bench.real("inception"), bench.generated("inception")
        words, details = _words(sets[1], sets[0]), _against(sets[0])
        real, fake = _rows(sets[0]), _rows(sets[1])
    found = kernel_distance(real, fake, how.kid_subsets, how.kid_size)
    words = f"{words}; {how.kid_subsets} subsets of {how.kid_size}, (xy/d + 1)^3"
    figures = {"kid": Figure(found.mean, len(fake)), "kid_std": Figure(found.std, len(fake))}
    return Result(figures, words, details)


def _pr(bench: Bench) -> Result:
    if bench.world:
        quality, features = bench.quality()
        pair, counts = (quality.precision, quality.recall), (quality.n, quality.n)
        words = f"{_judge_words(features)}, k = 3, against one real picture of each prompt"
        details: dict[str, Any] = {}
    else:
        protocol, k = bench.switches.pr_protocol(), bench.switches.pr_k
        fake, real = bench.generated(protocol), bench.real(protocol)
        pair, counts = precision_recall(_rows(real), _rows(fake), k), (fake.count, real.count)
        words, details = f"{_words(fake, real)}; k = {k}", _against(real)
    names = ("precision", "recall")  # shares of the pictures, and of the real ones
    figures = {m: Figure(v, n) for m, v, n in zip(names, pair, counts, strict=True)}
    return Result(figures, words, details)


def _clip(bench: Bench) -> Result:
    clip, how = bench.clip("clip"), bench.switches
    prepare = clip_score.score_picture(clip.image_encoder.config.image_size, how.clip_first)
    files = [row.file for row in bench.rows]
    pictures = clip_score.embed_pictures(clip, files, prepare, bench.batch)
    figures, details = {}, dict(_tool(bench, "clip"))

    def add(name: str, kept: list[int], texts: list[str]) -> None:
        embedded, cut = clip_score.embed_texts(clip, [how.prefix + text for text in texts])
        found = clip_score.cosines(pictures[kept], embedded).double()
        figures[name] = Figure(found.mean().item(), len(found))
        details[f"{name}_std"] = found.std(correction=0).item()
        details[f"{name}_texts_cut"] = cut

    every = list(range(len(files)))
    add("clip", every, [row.prompt or "" for row in bench.rows])
    negative = [i for i in every if bench.rows[i].negative]
    if negative:
        add("clip_negative", negative, [bench.rows[i].negative or "" for i in negative])
        texts = {bench.rows[i].negative for i in negative}
        details["negative"] = texts.pop() if len(texts) == 1 else f"{len(texts)} texts"
    first = f"centre crop, LANCZOS to {how.clip_first}, then " if how.clip_first else ""
    words = f"cosine (not x100), {_arch(bench, 'clip')}, texts behind {how.prefix!r}; {first}"
    return Result(figures, f"{words}CLIP's preprocessing by PIL, fp32", details)


def _hpsv2(bench: Bench) -> Result:
    clip, how = bench.clip("hps"), bench.switches
    details = {**_tool(bench, "hps"), "version": how.hps_version}
    details |= {"antialias": how.hps.antialias, "jpeg": how.hps.jpeg}
    words = f"100 cosine, {how.hps_version} weights as given, bare prompts; {how.hps.words()}, fp32"
    if not bench.benchmark:
        found = hpsv2.scores(clip, bench.rows, how.hps, bench.batch)
        figure = Figure(found.double().mean().item(), len(found))
        words += "; not the benchmark's prompts"
        return Result({f"score {how.hps_version}": figure}, words, details)
    scores = {
        style: hpsv2.scores(clip, rows, how.hps, bench.batch).double().tolist()
        for style, rows in bench.benchmark.items()
    }
    counts = {style: len(found) for style, found in scores.items()}
    table = hpsv2.aggregate(scores)
    counts["average"] = sum(counts.values())
    figures = {
        f"{style} {how.hps_version}": Figure(mean, counts[style])
        for style, (mean, _) in table.items()
    }
    details["group_std"] = {style: std for style, (_, std) in table.items()}
    groups = min(hpsv2.GROUPS, *(counts[style] for style in scores))
    return Result(figures, f"{words}; means of {groups} groups a style", details)


def _removal(bench: Bench) -> Result:
    return _world_removal(bench.world, bench.batch) if bench.world else _clip_removal(bench)


def _clip_removal(bench: Bench) -> Result:
    clip, how = bench.clip("clip"), bench.switches
    prepare = clip_score.score_picture(clip.image_encoder.config.image_size, how.clip_first)
    table, made = [], {}
    for pair in bench.pairs:
        texts, _ = clip_score.embed_texts(clip, [pair.shows, *pair.others])
        rates = {}
        for name, negative in (("before", None), ("after", pair.negative)):
            key = pair.prompt, negative
            if key not in made:
                files = pairs.pictures(bench.removal, pair, negative)
                made[key] = clip_score.embed_pictures(clip, files, prepare, bench.batch)
            rates[name] = Rate.of(pairs.free(made[key], texts), len(made[key]))
        table.append({**pair._asdict(), **{name: vars(rate) for name, rate in rates.items()}})
    figures: dict[str, Figure] = {}
    for pair, row in zip(bench.pairs, table, strict=True):
        alone = [p.negative for p in bench.pairs].count(pair.negative) == 1
        label = pair.negative if alone else f"{pair.negative} ({pair.prompt})"
        for name in ("before", "after"):
            rate = row[name]
            figures[f"{label} {name}"] = Figure(rate["free"], rate["n"], rate["low"], rate["high"])
    for name in ("before", "after"):
        n = sum(row[name]["n"] for row in table)
        rate = Rate.of(round(sum(row[name]["free"] * row[name]["n"] for row in table)), n)
        figures[name] = Figure(rate.free, n, rate.low, rate.high)
    words = (
        f"share of pictures free of the negative, {len(table)} pairs; zero-shot judge "
        f"{_arch(bench, 'clip')}: the most similar of the texts compared; Wilson 95 %"
    )
    return Result(figures, words, {**_tool(bench, "clip"), "pairs": table})


def _world_removal(bench: WorldBench, batch: int) -> Result:
    assert bench.generate is not None
    generate, ruler = bench.generate, bench.ruler

    def unguided(prompts: list[str], negatives: list[str] | None, indices: list[int]) -> Tensor:
        return generate(prompts, None, indices)

    test = RemovalTest(
        unguided, ruler.judge, ruler.world, Noise(bench.seed),
        count=bench.count, split="held-out", batch=batch,
    )  # fmt: skip
    report = test.measure(generate)
    figures = {}
    for kind in ("easy", "targeted"):
        total = report.tables()[kind]["total"]
        if not total["n"]:
            continue  # the judge reads nothing in any picture
        before = Rate.of(round(total["free_before"] * total["n"]), total["n"])
        figures[f"{kind} before"] = Figure(before.free, before.n, before.low, before.high)
        low, high = total["free_low"], total["free_high"]
        figures[f"{kind} after"] = Figure(total["free"], total["n"], low, high)
        for name in ("keep", "same"):
            if total[name] is not None:
                low, high = total[f"{name}_low"], total[f"{name}_high"]
                counted = total["named" if name == "keep" else "others"]
                figures[f"{kind} {name}"] = Figure(total[name], counted, low, high)
    words = (
        f"share of pictures free of the negative, by the {ruler.world.name} world's judge, "
        f"{bench.count} held-out prompts an attribute; easy: a random negative, targeted: what the "
        "same noise shows without it; keep: of what the prompt names, same: of what nobody named"
    )
    return Result(figures, words, report.to_dict())


def _named(bench: Bench) -> Result:
    assert bench.world is not None
    (quality, _), ruler = bench.quality(), bench.world.ruler
    named = [ruler.world.named(prompt) for prompt in ruler.prompts]
    counts = {"all": sum(map(bool, named))}
    counts |= {name: sum(name in one for one in named) for name in quality.attributes}
    figures = {}
    for name, share in {"all": quality.all_right, **quality.attributes}.items():
        rate = Rate.of(round(share * counts[name]), counts[name])
        figures[name] = Figure(share, rate.n, rate.low, rate.high)
    words = f"what the prompt names is right, by the {ruler.world.name} world's judge"
    return Result(figures, f"{words}; Wilson 95 %")


METRICS: dict[str, Callable[[Bench], Result]] = {
    "fid": _fid,
    "kid": _kid,
    "pr": _pr,
    "clip": _clip,
    "hpsv2": _hpsv2,
    "removal": _removal,
    "named": _named,
}


def measure(
    metrics: Sequence[str], bench: Bench, say: Callable[[str], None] = lambda text: None
) -> dict[str, Result]:
    """The results of metrics by name, in their order. Call `check` first.

    say: told what is measured. Raises ValueError for pictures or features that cannot be measured.
    """
    found = {}
    for name in metrics:
        say(f"measuring {name}")
        started = time.monotonic()
        result = METRICS[name](bench)
        seconds = time.monotonic() - started
        found[name] = Result(result.figures, result.protocol, result.details, seconds)
    return found


# --- what they need -------------------------------------------------------------------------------


_LEAST = 4  # pictures that a world's judge takes all its figures of


def names(text: str) -> list[str]:
    """Metrics from a list with commas. Raises ValueError for an unknown one, or none."""
    found = list(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    unknown = [name for name in found if name not in METRICS]
    if unknown or not found:
        raise ValueError(
            f"--metrics: expected some of {', '.join(METRICS)}, got {(unknown or [text])[0]!r}"
        )
    return found


def check(metrics: Sequence[str], bench: Bench) -> None:
    """ValueError, naming metric and option, if something that a metric reads was not given.

    Looks at what is there and at its kind, not at pictures: `bench.rows` may name files that are
    drawn later.
    """
    for name in metrics:
        if name in ("fid", "kid", "pr") and bench.world is None:
            _check_distance(name, bench)
        if name in ("fid", "kid", "pr", "named") and bench.world and bench.count < _LEAST:
            raise ValueError(f"{name}: a world needs {_LEAST} pictures or more, got {bench.count}")
        if name == "kid":
            have, real = bench.count, bench.reference
            if isinstance(real, Path):
                have = min(have, len(picture_files(real)))
            elif real is not None:
                have = min(have, real.count)
            if bench.switches.kid_size > have:
                size = bench.switches.kid_size
                raise ValueError(f"kid: subsets of {size} wanted, {have} pictures: --kid-size")
        if name == "clip":
            _check_texts(name, bench.rows)
            _check_clip(name, "clip", bench)
        if name == "hpsv2":
            if bench.switches.hps_version not in hpsv2.VERSIONS:
                raise ValueError(
                    f"hpsv2: --hps-version must say which weights --hps holds: "
                    f"{' or '.join(hpsv2.VERSIONS)} (scores of the two do not compare)"
                )
            if not bench.benchmark:
                _check_texts(name, bench.rows)
            _check_clip(name, "hps", bench)
            _check_version(bench)
        if name == "removal" and bench.world is None:
            _check_clip(name, "clip", bench)
            for pair in bench.pairs:
                for negative in (None, pair.negative):
                    pairs.pictures(bench.removal, pair, negative)
        if name == "removal" and bench.world and not bench.world.draws:
            raise ValueError("removal: a world's checker draws its own pictures: give a model")
        if name == "named" and bench.world is None:
            raise ValueError("named: only a world knows what its prompts name: --world")


def _check_distance(name: str, bench: Bench) -> None:
    protocol = bench.switches.pr_protocol() if name == "pr" else "inception"
    tool = PROTOCOLS[protocol].tool
    if bench.reference is None:
        raise ValueError(f"{name}: --reference must name real pictures, or a file of features")
    least = bench.switches.pr_k + 1 if name == "pr" else 2
    for what, given in (("--features", bench.features), ("--reference", bench.reference)):
        if isinstance(given, Features):
            if name != "fid" and given.rows is None:
                raise ValueError(f"{name}: {given.source} holds statistics, and rows are needed")
            if given.count < least:
                raise ValueError(f"{name}: {given.source} holds {given.count} rows, not {least}")
        elif what == "--reference":
            assert isinstance(given, Path)
            if len(picture_files(given)) < least:
                raise ValueError(f"{name}: {given} must hold {least} pictures or more")
    if bench.features is None and bench.count < least:
        raise ValueError(f"{name}: needs {least} pictures or more, got {bench.count}")
    if bench.features is None or isinstance(bench.reference, Path):
        if tool not in bench.tools:
            raise ValueError(f"{name}: --{tool} must name a folder of tools ({protocol} features)")
        feature_files.check_tool(bench.tools[tool], tool)
    _check_alike(name, protocol, bench)
    if bench.keep and bench.features is None:
        _check_kept(bench.keep, bench.rows, protocol)


def _check_alike(name: str, protocol: str, bench: Bench) -> None:
    """ValueError if features that were given, or will be made, are of two protocols or widths."""
    fake, real = bench.features, bench.reference
    sides = [given for given in (fake, real) if isinstance(given, Features)]
    stated = [side.protocol for side in sides if side.protocol]
    asked = name == "pr" and (bench.switches.bgr or bench.switches.pr_features != "inception")
    if len(sides) < 2 or asked:
        stated.append(protocol)
    if asked and len(sides) == 2 and not all(side.protocol for side in sides):
        raise ValueError(f"{name}: {protocol} asked for, and the files do not say theirs")
    if len(set(stated)) > 1:
        first, second = list(dict.fromkeys(stated))[:2]
        raise ValueError(f"{name}: {first} and {second} features cannot be compared")
    widths = [side.width for side in sides]
    if len(sides) == 1:
        widths.append(feature_files.width_of(bench.tools[PROTOCOLS[protocol].tool]))
    if len(set(widths)) > 1:
        raise ValueError(
            f"{name}: features of {widths[0]} and {widths[1]} values cannot be compared"
        )


def _check_kept(folder: Path, rows: Sequence[Row], protocol: str) -> None:
    """ValueError for kept features of pictures that are not drawn yet: they are of others."""
    path = feature_files.kept_at(folder, [row.file for row in rows], protocol)
    if path.exists() and not all(row.file.is_file() for row in rows):
        raise ValueError(f"{path} is of other pictures: remove it, or give another folder")


def _check_texts(name: str, rows: Sequence[Row]) -> None:
    lost = next((row.file for row in rows if row.prompt is None), None)
    if lost or not rows:
        raise ValueError(f"{name}: the pictures' prompts are not known: --prompts")


def _check_clip(name: str, tool: str, bench: Bench) -> None:
    if tool not in bench.tools:
        raise ValueError(f"{name}: --{tool} must name a folder of tools with a CLIP")
    folder = bench.tools[tool]
    spec, _ = read_tools(folder)
    towers = {"image_encoder", "text_encoder"} <= set(spec.parts())
    if not towers or any(defer_part(folder, spec, part) is None for part in spec.parts()):
        raise ValueError(f"--{tool}: {folder} holds {spec.arch}, not a CLIP")
    if load_tokenizer(folder, spec, 0) is None:
        raise ValueError(f"--{tool}: {folder} holds no tokenizer")


def _check_version(bench: Bench) -> None:
    """ValueError if the folder's source is called after another version than was given."""
    sources = str(read_tools(bench.tools["hps"])[1])
    named = [v for v in hpsv2.VERSIONS if f"HPS_{v}_" in sources.replace("HPS_v2_", "HPS_v2.0_")]
    if named and bench.switches.hps_version not in named:
        raise ValueError(
            f"hpsv2: --hps-version {bench.switches.hps_version}, but {bench.tools['hps']} was made "
            f"of {named[0]} weights"
        )


# --- words ----------------------------------------------------------------------------------------


def _rows(features: Features) -> Tensor:
    assert features.rows is not None
    return features.rows


def _words(fake: Features, real: Features) -> str:
    said = []
    for side in (fake, real):
        known = PROTOCOLS.get(side.protocol)
        said.append(known.words if known else f"features of unknown protocol ({side.width} values)")
    words = " against ".join(dict.fromkeys(said))
    return f"{words}; {fake.source} against {real.source}"


def _against(real: Features) -> dict[str, Any]:
    return {"reference": real.source, "reference_count": real.count}


def _judge_words(features: Tensor) -> str:
    return f"{features.shape[1]} features of the world's judge"


def _arch(bench: Bench, tool: str) -> str:
    return read_tools(bench.tools[tool])[0].arch


def _tool(bench: Bench, tool: str) -> dict[str, Any]:
    """Which network measured: its name, and what its folder says of its source."""
    spec, provenance = read_tools(bench.tools[tool])
    return {"network": spec.arch, "provenance": provenance}
