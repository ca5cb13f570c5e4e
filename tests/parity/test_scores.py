"""Scores from picture files: the published pipelines, written down with open_clip, torchvision and
torch-fidelity, on networks of random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from snoopi import folders, zoo
from snoopi.evaluate import clip_score, features, hpsv2, measure, pairs
from snoopi.evaluate.hpsv2 import Reading
from snoopi.evaluate.measure import Bench, Switches
from snoopi.evaluate.picture_sets import Row
from snoopi.folders import Clip
from snoopi.models.clip import CLIPText, CLIPTextConfig
from snoopi.models.clip_vision import CLIPVision, CLIPVisionConfig
from snoopi.tokenize import Tokenizer
from tests.parity import oracle, test_clip_vision, test_inception
from tests.parity.test_preprocess import open_clip_transform, picture

pytestmark = pytest.mark.parity
IMAGE = CLIPVisionConfig(
    width=160, mlp_width=96, layers=2, heads=2, patch=32, projection=24, activation="gelu"
)
TEXT = CLIPTextConfig(
    width=48, mlp_width=64, layers=2, heads=3, projection=24, activation="gelu"
)  # CLIP's vocabulary and length
PROMPTS = [
    "a photo of a cat",
    "A  Red &amp; white Boat,\n on the sea!",
    "word " * 100,
    "don't draw 3 dogs (please): caf\u00e9",
]
SIZES = [(256, 256), (300, 420), (512, 512), (90, 70)]


@pytest.fixture(scope="module")
def both() -> tuple[Clip, Any]:
    """Ours and open_clip's, of the same random weights."""
    theirs = test_clip_vision.open_clip_model(IMAGE, TEXT)
    ours: list[Any] = [CLIPVision(IMAGE).eval(), CLIPText(TEXT).eval()]
    for net, state in zip(ours, test_clip_vision.from_open_clip(theirs.state_dict()), strict=True):
        net.requires_grad_(False).load_state_dict(state, strict=True)
    return Clip(*ours, Tokenizer.clip(0)), theirs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(SIZES):
        picture(*size, seed=i).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@torch.no_grad()
def published(theirs: Any, pictures: Tensor, texts: list[str]) -> Tensor:
    """open_clip's tokenizer, towers and cosines."""
    ids = oracle.package("open_clip").get_tokenizer("ViT-g-14")(texts)
    images, words = unit(theirs.encode_image(pictures)), unit(theirs.encode_text(ids))
    return (images * words).sum(-1)


def close(got: Tensor, want: Tensor, at_most: float = 1e-6) -> None:
    worst = float((got.double() - want.double()).abs().max())
    print(f"max error {worst:.2e}")
    assert got.shape == want.shape and worst <= at_most
    assert float(want.std()) > 1e3 * at_most, "the oracle's scores are all alike"


def rows(files: list[Path]) -> list[Row]:
    return [Row(f, text, "ugly") for f, text in zip(files, PROMPTS, strict=True)]


@pytest.mark.parametrize("first", [256, None])
def test_pictures_for_the_clip_score_are_open_clips_bit_for_bit(
    files: list[Path], first: int | None
) -> None:
    transform, ours = open_clip_transform(), clip_score.score_picture(224, first)
    for file in files:
        image = Image.open(file)
        want = image
        if first:
            side = min(image.size)
            left, top = (round((length - side) / 2) for length in image.size)
            box = (left, top, left + side, top + side)
            want = image.crop(box).resize((first, first), Image.Resampling.LANCZOS)
        assert torch.equal(ours(image)[0], transform(want))


def test_clip_score(both: tuple[Clip, Any], files: list[Path], tmp_path: Path) -> None:
    """As the COCO-30K line has it: pictures at 256, "A photo depicts ", bare cosines."""
    clip, theirs = both
    images = [Image.open(f).convert("RGB") for f in files]
    squares = [clip_score.reference_picture(image) for image in images]
    prepared = torch.stack([open_clip_transform()(image) for image in squares])
    want = published(theirs, prepared, [f"A photo depicts {text}" for text in PROMPTS])
    prepare = clip_score.score_picture(224)
    texts, cut = clip_score.embed_texts(clip, [clip_score.PREFIX + t for t in PROMPTS], batch=3)
    assert cut == 1
    close(clip_score.cosines(clip_score.embed_pictures(clip, files, prepare, 3), texts), want)
    # And through the front door, from a folder of tools, with the negative's.
    tool = save(clip, tmp_path)
    bench = Bench(rows(files), tools={"clip": tool}, batch=2)
    measure.check(["clip"], bench)
    found = measure.measure(["clip"], bench)["clip"]
    assert found.figures["clip"].value == pytest.approx(float(want.double().mean()), abs=1e-6)
    away = published(theirs, prepared, ["A photo depicts ugly"] * len(files)).double().mean()
    assert found.figures["clip_negative"].value == pytest.approx(float(away), abs=1e-6)
    assert found.details["clip_texts_cut"] == 1


def save(clip: Clip, folder: Path) -> Path:
    spec = zoo.ToolSpec("tiny-clip", {"image_encoder": IMAGE, "text_encoder": TEXT})
    nets = {"image_encoder": clip.image_encoder, "text_encoder": clip.text_encoder}
    return folders.save_tools(folder / "clip", spec, nets, clip.tokenizer)


def hps_transform(antialias: bool) -> Callable[[Image.Image], Tensor]:
    """hpsv2's: ToTensor, the long side to 224 as a tensor, black around it, normalise."""
    oracle.package("torchvision")
    from torchvision.transforms import InterpolationMode, ToTensor
    from torchvision.transforms import functional as tv

    def transform(image: Image.Image) -> Tensor:
        x = ToTensor()(image.convert("RGB"))
        high, wide = x.shape[1:]
        scale = 224 / float(max(high, wide))
        new = [round(high * scale), round(wide * scale)]
        x = tv.resize(x, new, InterpolationMode.BICUBIC, antialias=antialias)
        left, top = (224 - new[1]) // 2, (224 - new[0]) // 2
        x = tv.pad(x, [left, top, 224 - new[1] - left, 224 - new[0] - top], fill=0)
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        return tv.normalize(x, list(mean), list(std))

    return transform


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("jpeg", [75, None])
def test_hpsv2(
    both: tuple[Clip, Any], files: list[Path], tmp_path: Path, antialias: bool, jpeg: int | None
) -> None:
    """100 cosines of bare prompts; the published pipeline saves .jpg files and reads those."""
    clip, theirs = both
    scored = files
    if jpeg:
        scored = [tmp_path / f"{file.stem}.jpg" for file in files]
        for file, to in zip(files, scored, strict=True):
            Image.open(file).save(to)
    transform = hps_transform(antialias)
    prepared = torch.stack([transform(Image.open(file)) for file in scored])
    want = 100 * published(theirs, prepared, PROMPTS)
    reading = Reading(antialias, jpeg)
    got = hpsv2.scores(clip, rows(files), reading, batch=3)
    close(got, want, 1e-4)
    if jpeg:  # pictures that are JPEG files already are not written again
        again = hpsv2.scores(clip, rows(scored), reading)
        assert torch.equal(again, hpsv2.scores(clip, rows(scored), Reading(antialias, None)))
        close(again, want, 1e-4)


def test_hpsv2s_switches_matter(both: tuple[Clip, Any], files: list[Path]) -> None:
    readings = [Reading(a, j) for a in (True, False) for j in (75, None)]
    found = [hpsv2.scores(both[0], rows(files), reading) for reading in readings]
    for i, a in enumerate(found):
        assert all(float((a - b).abs().max()) > 1e-3 for b in found[:i])


def test_zero_shot_removal(both: tuple[Clip, Any], files: list[Path], tmp_path: Path) -> None:
    """Free: open_clip's softmax over the texts is not largest at the one that names it."""
    clip, theirs = both
    pair = pairs.Pair("a pet", "cat", "a photo of a cat", ("a photo of a dog", "nothing at all"))
    ids = oracle.package("open_clip").get_tokenizer("ViT-g-14")([pair.shows, *pair.others])
    squares = [clip_score.reference_picture(Image.open(f)) for f in files]
    prepared = torch.stack([open_clip_transform()(image) for image in squares])
    with torch.no_grad():
        cosine = unit(theirs.encode_image(prepared)) @ unit(theirs.encode_text(ids)).T
    free = (cosine * 100).softmax(-1).argmax(-1) != 0
    sets = [Row(f, pair.prompt, n) for f, n in zip(files, [None, None, "cat", "cat"], strict=True)]
    bench = Bench(removal=sets, pairs=[pair], tools={"clip": save(clip, tmp_path)})
    measure.check(["removal"], bench)
    found = measure.measure(["removal"], bench)["removal"]
    want = [float(part.double().mean()) for part in (free[:2], free[2:])]
    assert [found.figures[name].value for name in ("before", "after")] == want


# --- features -------------------------------------------------------------------------------------


def clean_fid(image: Image.Image) -> Tensor:
    """clean-fid's build_resizer("clean"), [3 299 299] from 0 to 255."""
    x = np.asarray(image.convert("RGB"))
    channels = [
        np.asarray(
            Image.fromarray(x[:, :, c].astype(np.float32), mode="F").resize((299, 299), 3)
        ).clip(0, 255)
        for c in range(3)
    ]
    return torch.from_numpy(np.stack(channels))


def test_inception_reads_as_clean_fid_and_torch_fidelity(files: list[Path], tmp_path: Path) -> None:
    """Features and FID of files: clean-fid's resize, and TensorFlow 1's by torch-fidelity."""
    module = oracle.package("torch_fidelity.feature_extractor_inceptionv3")
    net: nn.Module = test_inception.randomise(zoo.fresh("inception-fid", "network", 0))
    tool = folders.save_tools(tmp_path / "tool", zoo.TOOLS["inception-fid"], {"network": net})
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    theirs = module.FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048"],
        feature_extractor_weights_path=str(tmp_path / "weights.pth"),
    )
    squares = [clip_score.reference_picture(Image.open(f)) for f in files]
    for name, order in (("inception-tf1", [0, 1, 2]), ("inception-tf1-bgr", [2, 1, 0])):
        pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in squares])
        (want,) = theirs(pixels[:, order])
        got = features.of_files(files, name, tool, batch=3)
        oracle.close(name, got.rows, want)
    with torch.no_grad():
        want = net(torch.stack([clean_fid(image) for image in squares])).features
    got = features.of_files(files, "inception", tool, batch=3)
    oracle.close("clean-fid", got.rows, want)
    other = features.of_files(files, "inception-tf1", tool)
    assert max(oracle.errors(other.rows, want)) > 1e-3, "the resizes must differ"


def test_vgg16_reads_as_torch_fidelity(files: list[Path]) -> None:
    module = oracle.package("torch_fidelity.interpolate_compat_tensorflow")
    from torchvision.transforms.functional import normalize

    for file in files:
        image = Image.open(file)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        x = module.interpolate_bilinear_2d_like_tensorflow1x(
            pixels, size=(224, 224), align_corners=False
        )
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        want = normalize(x, [255 * m for m in mean], [255 * s for s in std])
        oracle.close(file.name, features.PROTOCOLS["vgg16"].prepare(image), want)


def test_distances_of_files_are_torch_fidelitys(tmp_path: Path) -> None:
    """FID, KID and precision/recall through the front door, from files of features."""
    fid, kid, prc = (oracle.package(f"torch_fidelity.metric_{m}") for m in ("fid", "kid", "prc"))
    sides = [oracle.randn(200, 16, seed=i).exp() * (1 + 0.2 * i) for i in range(2)]
    for name, x in zip(("real", "fake"), sides, strict=True):
        made = features.Features.of(x, "inception", name)
        features.write_features(tmp_path / f"{name}.safetensors", made)
    real, fake = (features.read_features(tmp_path / f"{n}.safetensors") for n in ("real", "fake"))
    # Whole sets are the only subsets on which nothing is drawn.
    how = Switches(kid_subsets=2, kid_size=200)
    bench = Bench(features=fake, reference=real, switches=how)
    measure.check(["fid", "kid", "pr"], bench)
    found = measure.measure(["fid", "kid", "pr"], bench)
    got = {name: f.value for result in found.values() for name, f in result.figures.items()}
    statistics = [fid.fid_features_to_statistics(x.double()) for x in sides]
    want = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert got["fid"] == pytest.approx(want, rel=1e-6)
    words = {"kid_subsets": 2, "kid_subset_size": 200, "verbose": False}
    want = kid.kid_features_to_metric(*(x.double() for x in sides), **words)
    assert got["kid"] == pytest.approx(want[kid.KEY_METRIC_KID_MEAN], rel=1e-6)
    want = prc.prc_features_to_metric(sides[1], sides[0], prc_neighborhood=3, verbose=False)
    pair = want[prc.KEY_METRIC_PRECISION], want[prc.KEY_METRIC_RECALL]
    assert (got["precision"], got["recall"]) == pytest.approx(pair, abs=1e-6)
