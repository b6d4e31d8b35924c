"""The parts of the pretraining that need neither Ray nor a network: scenes, schedules, losses, warm starts."""

import io
import json
import platform
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import nn
from transformers import CLIPTokenizer

from jobs.judge_base import judge, table
from jobs.pretrain.augment import coarse, stretched, varied
from jobs.pretrain.clip import contrast, retrieval, tokenize, train_tokenizer
from jobs.pretrain.config import CONFIGS, Training, read_config
from jobs.pretrain.contexts import COLOURS, CONTEXTS
from jobs.pretrain.data import Compose, as_array
from jobs.pretrain.export import begin_snapshot
from jobs.pretrain.folders import Folders
from jobs.pretrain.judge import BaseJudge, SampleSizes, diversity
from jobs.pretrain.loop import average_decay, computes_bfloat16, learning_rate, load_matching
from jobs.pretrain.packs import EDGE, Icons, Pack
from jobs.pretrain.scenes import Composer, Mix
from jobs.pretrain.sprites import Sprites, draw_sprites, near_held
from jobs.pretrain.unet import UnetObjective, build_unet, latents_folder, make_latents, stratified
from jobs.pretrain.vae import build_vae, normalise_latents, psnr, take_over
from jobs.pretrain_base import main as pretrain
from objdrive.base.files import EMBEDDED, find_base
from objdrive.errors import ObjdriveError


@pytest.fixture(scope="module")
def sprites():
    return draw_sprites(0)


@pytest.mark.parametrize("context", range(len(CONTEXTS)))
def test_every_context_can_be_composed_and_is_named_in_the_caption(sprites, context):
    mix = Mix(pair=0, style=0, word_alone=0, no_context=0)
    scene = Composer(sprites, 48, mix).compose(np.random.default_rng(context), context=context)
    assert scene.pixels.shape == (48, 48, 3)
    assert scene.pixels.std() > 0
    assert scene.caption.endswith(list(CONTEXTS)[context])
    assert sprites.classes[scene.label] in scene.caption


def test_a_scene_number_is_the_same_scene_in_any_batch(sprites, tmp_path):
    sprites.save(tmp_path / "sprites.parquet")
    compose = Compose(tmp_path / "sprites.parquet", "train", 32, seed=5)
    together, alone = compose({"id": np.array([3, 4, 5])}), compose({"id": np.array([4])})
    assert together.slice(1, 1).to_pylist() == alone.to_pylist()
    assert together["pixels"][0] != together["pixels"][1]


def test_the_mask_of_a_scene_is_where_its_objects_are():
    red = np.zeros((EDGE, EDGE, 4), np.uint8)
    red[16:-16, 32:-32] = (255, 0, 0, 255)
    drawing = Sprites(np.stack([red]), ("apple",), np.array([0]), ("a",), ("train",))
    composer = Composer(drawing, 64, Mix(pair=0.5, style=0, tint=0))
    gray = list(CONTEXTS).index("on a gray background")
    for seed in range(20):
        scene = composer.compose(np.random.default_rng(seed), context=gray)
        reds = scene.pixels[..., 0].astype(int) - scene.pixels[..., 1] > 150
        assert reds[scene.mask > 230].all()
        assert not reds[scene.mask < 25].any()
        assert reds.any()


def test_a_tinted_object_shows_its_colour_word(sprites):
    composer = Composer(sprites, 64, Mix(pair=0, style=0, tint=1, small=0, large=1, word_alone=0))
    white = list(CONTEXTS).index("on a white background")
    for seed in range(30):
        scene = composer.compose(np.random.default_rng(seed), context=white)
        word = next(word for word in COLOURS if f" {word} {sprites.classes[scene.label]}" in scene.caption)
        middle = scene.pixels[28:36, 28:36].reshape(-1, 3).mean(axis=0)
        distances = {each: np.abs(middle - rgb).sum() for each, rgb in COLOURS.items()}
        assert distances[word] == min(distances.values()), scene.caption


def test_a_drawing_is_stretched_about_its_middle_by_a_quarter_at_most():
    disc = Image.new("RGBA", (128, 128))
    ImageDraw.Draw(disc).ellipse((32, 32, 95, 95), fill="red")
    boxes = []
    for seed in range(40):
        left, top, right, bottom = stretched(disc, np.random.default_rng(seed)).getchannel("A").getbbox()
        assert (left + right) / 2 == pytest.approx(64, abs=2)
        assert (top + bottom) / 2 == pytest.approx(64, abs=2)
        boxes.append(((right - left) / 64, (bottom - top) / 64))
    narrow, low = np.array(boxes).min(axis=0)
    assert 0.7 < narrow < 0.85
    assert 0.7 < low < 0.85
    assert max(max(box) for box in boxes) < 1.1


def test_scenes_of_stretched_drawings_are_others(sprites):
    def scenes(stretch):
        composer = Composer(sprites, 32, Mix(stretched=stretch))
        return [composer.compose(np.random.default_rng(seed)).pixels for seed in range(5)]

    assert all(not np.array_equal(a, b) for a, b in zip(scenes(0.0), scenes(1.0), strict=True))


def test_varied_pictures_differ_and_show_the_same(sprites):
    scenes = [Composer(sprites, 64).compose(np.random.default_rng(seed)).pixels for seed in range(40)]
    changed = [varied(pixels, np.random.default_rng((1, seed))) for seed, pixels in enumerate(scenes)]
    assert all(pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8 for pixels in changed)
    alike = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(scenes, changed, strict=True)]
    assert min(alike) > 0.8
    assert np.mean(alike) < 0.999


def test_coarse_pictures_keep_their_colours_and_lose_their_lines():
    lines = torch.zeros(1, 3, 64, 64)
    lines[..., ::2] = 1
    assert coarse(lines).shape == lines.shape
    assert coarse(lines).mean() == pytest.approx(0.5, abs=0.01)
    assert coarse(lines).std() < 0.25
    torch.testing.assert_close(coarse(torch.full((1, 3, 64, 64), 0.3)), torch.full((1, 3, 64, 64), 0.3))


def test_relations_in_captions_are_those_in_the_picture(sprites):
    red, blue = [np.full((EDGE, EDGE, 4), 255, np.uint8) for _ in range(2)]
    red[..., 1:3] = 0
    blue[..., :2] = 0
    pair = Sprites(np.stack([red, blue]), ("apple", "book"), np.array([0, 1]), ("a", "b"), ("train", "train"))
    composer = Composer(pair, 64, Mix(pair=1, style=0, word_alone=0))
    gray = list(CONTEXTS).index("on a gray background")
    said = set()
    for seed in range(60):
        scene = composer.compose(np.random.default_rng(seed), context=gray)
        reds, blues = (np.argwhere(scene.pixels[..., c].astype(int) - scene.pixels[..., 2 - c] > 120) for c in (0, 2))
        (red_y, red_x), (blue_y, blue_x) = reds.mean(axis=0), blues.mean(axis=0)
        true = {
            "an apple to the left of a book": red_x < blue_x,
            "a book to the left of an apple": blue_x < red_x,
            "an apple to the right of a book": red_x > blue_x,
            "a book to the right of an apple": blue_x > red_x,
            "an apple above a book": red_y < blue_y,
            "a book above an apple": blue_y < red_y,
            "an apple below a book": red_y > blue_y,
            "a book below an apple": blue_y > red_y,
        }
        for words in (words for words in true if words in scene.caption):
            said.add(words)
            assert true[words], scene.caption
    assert len(said) == 8


def test_sprites_come_back_from_their_file(sprites, tmp_path):
    sprites.save(tmp_path / "sprites.parquet")
    again = Sprites.load(tmp_path / "sprites.parquet")
    assert (again.pictures == sprites.pictures).all()
    assert (again.classes, again.sources, again.use) == (sprites.classes, sprites.sources, sprites.use)
    assert set(again.only("held").use) == {"held"}


def test_what_is_nearly_a_held_drawing_of_its_class_is_found():
    features = torch.tensor([[1.0, 0.0], [0.99, 0.02], [0.0, 1.0], [1.0, 0.01]])
    labels, held = np.array([0, 0, 0, 1]), np.array([True, False, False, False])
    assert near_held(features, labels, held).tolist() == [False, True, False, False]


def test_icons_are_found_by_any_spelling_of_their_name_and_drawn_upright(tmp_path):
    pack = Pack("set", "set", "@icons/set@1.0.0", "MIT", "Nobody", "https://example.org")
    body = '<path fill="#f00" d="M0 0h20v10H0z"/>'
    icons = {"width": 20, "height": 20, "icons": {"hot-cup-2": {"body": body}}}
    with tarfile.open(tmp_path / "set.tgz", "w:gz") as archive:
        content = json.dumps(icons).encode()
        entry = tarfile.TarInfo("package/icons.json")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    with Icons(pack, tmp_path / "set.tgz", {}) as found:
        assert list(found.find(["hot-cup"])) == list(found.find(["set/hotcup"])) == ["hot-cup-2"]
        assert list(found.find(["other/hot-cup"])) == []
        picture = found.draw("hot-cup-2")
    rows, columns = np.nonzero(picture[..., 3] > 128)
    assert np.ptp(columns) + 1 == pytest.approx(EDGE - 4, abs=2)
    assert np.ptp(rows) + 1 == pytest.approx((EDGE - 4) / 2, abs=2)
    assert picture[EDGE // 2, EDGE // 2].tolist() == [255, 0, 0, 255]


def test_learning_rate_warms_up_stays_and_cools_down():
    training = Training(batch=1, lr=2.0, warmup=10, cooldown=0.25, share=1)
    assert learning_rate(training, 4, 0.0) == 1.0
    assert learning_rate(training, 500, 0.7) == 2.0
    assert learning_rate(training, 500, 0.875) == pytest.approx(1.0)
    assert 0 < learning_rate(training, 500, 1.0) < 0.1


def test_the_running_mean_forgets_its_start_first_and_then_hardly():
    training = Training(batch=1, lr=1.0, ema=0.999, share=1)
    assert average_decay(training, 0) == pytest.approx(0.1)
    assert average_decay(training, 10**6) == 0.999


def test_timesteps_of_a_batch_are_spread_evenly_over_their_odds():
    odds = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    odds /= odds.sum()
    generator = torch.Generator().manual_seed(1)
    together = torch.bincount(stratified(odds, 500, generator), minlength=40)
    assert (together - 500 * odds).abs().max() <= 1
    alone = torch.bincount(torch.cat([stratified(odds, 1, generator) for _ in range(20_000)]), minlength=40)
    # Five standard deviations of a count.
    assert ((alone - 20_000 * odds).abs() <= 5 * (20_000 * odds * (1 - odds)).sqrt()).all()


class _Guess(nn.Module):
    """In a denoiser's place: always the same prediction."""

    def __init__(self, predicted):
        super().__init__()
        self.predicted = predicted

    def forward(self, noised, timesteps, states):
        return SimpleNamespace(sample=self.predicted)


def test_the_denoiser_learns_the_velocity_of_all_and_the_noise_of_objects():
    generator = torch.Generator().manual_seed(0)
    latents, noise, predicted = torch.randn(3, 4, 2, 8, 8, generator=generator)
    masks = torch.zeros(4, 1, 8, 8)
    masks[:, :, 2:5, 3:7] = 1
    timesteps = torch.tensor([10, 300, 600, 990])
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[timesteps]
    losses = UnetObjective(_Guess(predicted))(
        {"latents": latents, "masks": masks, "states": None, "noise": noise, "timesteps": timesteps}
    )
    error = (predicted - noise).square().numpy()
    whole = np.mean([error[i].mean() / float(alphas[i]) for i in range(4)])
    objects = np.mean([error[i][:, 2:5, 3:7].mean() for i in range(4)])
    assert float(losses["whole"]) == pytest.approx(whole, rel=1e-4)
    assert float(losses["objects"]) == pytest.approx(objects, rel=1e-4)
    assert float(losses["loss"]) == pytest.approx(whole + objects, rel=1e-4)


CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.exists(), reason="asks Linux about an x86 processor")
def test_bfloat16_is_for_processors_with_instructions_for_it():
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    assert computes_bfloat16(torch.device("cpu")) == bool({"amx_bf16", "avx512_bf16"} & set(flags))


def test_contrast_is_the_mean_of_both_cross_entropies():
    images, texts = (F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    logits = (10 * images @ texts.T).double().numpy()
    rows = np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(axis=0)) - np.diag(logits)
    assert float(contrast(images, texts, torch.tensor(10.0))) == pytest.approx(
        (rows.mean() + columns.mean()) / 2, rel=1e-5
    )


def test_retrieval_counts_own_captions_among_so_many():
    unit = torch.eye(4)
    assert retrieval(unit, unit[[0, 1, 3, 2]], 4) == 0.5
    assert retrieval(unit, unit[[0, 1, 3, 2]], 2) == 0.5


def test_psnr_is_that_of_the_squared_error():
    real = torch.zeros(2, 3, 4, 4)
    made = torch.stack([real[0] + 0.1, real[1] + 0.01])
    assert psnr(made, real).tolist() == pytest.approx([20.0, 40.0], rel=1e-4)


def test_diversity_is_the_mean_distance_within_a_prompt():
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [2.0, 0.0]]])
    assert diversity(features) == pytest.approx(0.5)


def test_a_tokenizer_learned_from_captions_spells_any_text():
    config = read_config("smoke")
    tokenizer = train_tokenizer(["a photo of a kite on grass"] * 50 + ["a kite in the snow"] * 50, config)
    assert isinstance(tokenizer, CLIPTokenizer)
    assert tokenizer.tokenize("kite") == ["kite</w>"]
    ids = tokenize(tokenizer, ["a kite", "zebra λ"])
    assert ids.shape == (2, config.length)
    assert ids[0, 0] == tokenizer.bos_token_id
    assert ids[0, -1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1], skip_special_tokens=True).strip() == "zebra λ"


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_parts_of_every_shipped_configuration_fit_together(name):
    config = read_config(name)
    with torch.device("meta"):
        vae, unet = build_vae(config), build_unet(config)
        latents = vae.encode(torch.empty(2, 3, config.resolution, config.resolution)).latent_dist.mode()
        states = torch.empty(2, config.length, config.clip.model["text"]["hidden_size"])
        assert vae.decode(latents).sample.shape[2:] == (config.resolution, config.resolution)
        assert unet(latents, torch.zeros(2, dtype=torch.long), states).sample.shape == latents.shape
    assert config.resolution % config.clip.model["vision"]["patch_size"] == 0


@pytest.fixture(scope="module")
def old():
    return EMBEDDED / "tiny64"


def test_an_autoencoder_that_goes_on_from_a_base_keeps_its_latents(old):
    config = read_config("tiny64")
    vae = build_vae(config)
    take_over(vae, "tiny64")
    theirs = AutoencoderKL.from_pretrained(old / "vae", torch_dtype=torch.float32)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = theirs.encode(pixels).latent_dist.mode()
    (vae.decode(vae.encode(pixels).latent_dist.mode()).sample - pixels).square().mean().backward()
    torch.optim.SGD([one for one in vae.parameters() if one.requires_grad], lr=1.0).step()
    assert torch.equal(vae.encode(pixels).latent_dist.mode(), latents)
    assert not torch.allclose(vae.decode(latents).sample, theirs.decode(latents).sample, atol=1e-3)
    assert vae.config["scaling_factor"] == theirs.config["scaling_factor"]


def test_an_autoencoder_of_other_sizes_cannot_go_on_from_a_base():
    with pytest.raises(ObjdriveError, match="the autoencoder of tiny64 is of other sizes"):
        take_over(build_vae(read_config("small128")), "tiny64")


def test_latents_are_those_of_an_encoder_whatever_its_decoder(old, tmp_path):
    folders = Folders(tmp_path)
    vae = AutoencoderKL.from_pretrained(old / "vae")

    def place():
        vae.save_pretrained(folders.snapshot / "vae")
        return latents_folder(folders, folders.scenes)

    at_first = place()
    with torch.no_grad():
        vae.decoder.conv_out.weight += 1
        vae.post_quant_conv.weight += 1
    assert place() == at_first
    with torch.no_grad():
        vae.encoder.conv_in.weight += 1
    assert place() != at_first


def test_scenes_of_an_earlier_version_are_refused_before_they_are_encoded(old, tmp_path):
    folders = Folders(tmp_path)
    AutoencoderKL.from_pretrained(old / "vae").save_pretrained(folders.snapshot / "vae")
    folders.scenes.mkdir()
    pq.write_table(pa.table({"pixels": [b""], "caption": ["a"]}), folders.scenes / "0.parquet")
    with pytest.raises(ObjdriveError, match=r"scenes has no column 'mask'.*Remove it"):
        make_latents(folders)


def test_a_snapshot_begins_as_the_base_to_start_from(tmp_path):
    folders = Folders(tmp_path)
    begin_snapshot(read_config("smoke"), folders)
    assert not folders.snapshot.exists()
    begin_snapshot(read_config("tiny64"), folders)
    assert find_base(str(folders.snapshot)).clip is None
    trained = folders.snapshot / "unet" / "diffusion_pytorch_model.safetensors"
    trained.write_bytes(b"trained on")
    begin_snapshot(read_config("tiny64"), folders)
    assert trained.read_bytes() == b"trained on"


def test_normalised_latents_have_unit_deviation_and_give_the_same_pictures(old):
    vae = AutoencoderKL.from_pretrained(old / "vae", torch_dtype=torch.float32)
    pixels = torch.rand(8, 3, 64, 64) * 2 - 1
    before = vae.encode(pixels).latent_dist
    made = vae.decode(before.mode()).sample
    deviations = before.mode().std(dim=(0, 2, 3))
    channels = len(deviations)
    normalise_latents(vae, before.mode().mean(dim=(0, 2, 3)), deviations)
    after = vae.encode(pixels).latent_dist
    assert torch.allclose(after.mode().mean(dim=(0, 2, 3)), torch.zeros(channels), atol=1e-4)
    assert torch.allclose(after.mode().std(dim=(0, 2, 3)), torch.ones(channels), atol=1e-4)
    assert torch.allclose(after.std * deviations.view(-1, 1, 1), before.std, rtol=1e-3)
    assert torch.allclose(vae.decode(after.mode()).sample, made, atol=1e-4)


def test_only_weights_of_the_same_shape_are_taken_over(old):
    config = read_config("tiny64")
    text = config.clip.model["text"] | {"hidden_size": 64}
    clip = config.clip.model_copy(update={"model": config.clip.model | {"text": text}})
    theirs = UNet2DConditionModel.from_pretrained(old / "unet", torch_dtype=torch.float32)
    unet = build_unet(config.model_copy(update={"clip": clip}))
    load_matching(unet, theirs.state_dict())
    assert torch.equal(unet.conv_in.weight, theirs.conv_in.weight)
    narrower = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
    assert narrower.shape[1] == 64
    assert narrower.std() > 0


def test_binary_columns_are_read_across_chunks_and_slices():
    rows = [np.arange(4, dtype=np.float16) + i for i in range(6)]
    column = pa.chunked_array([pa.array([row.tobytes() for row in part]) for part in (rows[:2], rows[2:])]).slice(1, 4)
    assert (as_array(column, np.float16) == np.stack(rows[1:5])).all()


@pytest.mark.cluster
def test_a_judge_recognises_what_it_learned(sprites):
    judge = BaseJudge(sprites, 32, SampleSizes(taught=31))
    composer = Composer(sprites.only("train"), 32, Mix(pair=0, style=0, tint=0, small=0))
    scenes = [composer.compose(np.random.default_rng(seed)) for seed in range(24)]
    pixels = torch.stack([torch.from_numpy(np.array(Image.fromarray(s.pixels))).permute(2, 0, 1) for s in scenes]) / 255
    right, placed = judge.accuracy(judge.features(pixels), [s.label for s in scenes], [s.context for s in scenes])
    assert right > 0.8
    assert placed > 0.5


def test_a_configuration_with_an_unknown_field_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("resolution: 64\nscene: 3\n")
    with pytest.raises(ObjdriveError, match="scene"):
        read_config(str(path))
    with pytest.raises(ObjdriveError, match="small128, smoke, tiny64"):
        read_config("none-such")


def test_checkpoints_are_not_written_over(tmp_path, capsys):
    (tmp_path / "unet" / "checkpoints").mkdir(parents=True)
    assert pretrain(["--out", str(tmp_path), "--config", "smoke", "--stage", "unet"]) == 1
    assert "--resume" in capsys.readouterr().err


@pytest.mark.cluster
def test_bases_are_judged_on_the_same_scenes(sprites, tiny64, tmp_path):
    effort = SampleSizes(taught=8, judged=16, drawn=1, steps=2)
    figures = judge([tiny64], sprites, effort, tmp_path)
    assert set(figures) == {"scenes", "scenes of held-out drawings", "these at 36 of 64 pixels", "tiny64"}
    assert 20 < figures["tiny64"]["psnr"] < 40
    assert all(0 <= figures["tiny64"][name] <= 1 for name in ("class", "context", "diversity", "retrieval"))
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    with Image.open(tmp_path / "grid-0.png") as sheet:
        assert sheet.width == 20 * 64 * 2
    shown = table(figures)
    assert f"{figures['tiny64']['psnr']:.2f} dB" in shown
    assert len({line.count("|") for line in shown.splitlines()}) == 1
