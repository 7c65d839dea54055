"""The demo: its data, that a few steps learn something, its files, and its errors, each one line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")

from mmca_ext.demo import caption as caption_command  # noqa: E402
from mmca_ext.demo import data, distributed, problem, train  # noqa: E402
from mmca_ext.demo.__main__ import main  # noqa: E402
from mmca_ext.demo.model import Captioner, load_checkpoint, save_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of one short training run."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "HELD_OUT_CANVASES", 300)
        assert main(["train", "--steps", "25", "--batch-size", "32", "--out", str(out)]) == 0
    return out


# Data


def test_held_out_digits_are_never_trained_on():
    training, held_out = data.split_digits()
    assert not set(training.source) & set(held_out.source)
    assert len(set(training.source) | set(held_out.source)) == 1797
    share = np.bincount(held_out.values) / np.bincount(np.concatenate([training.values, held_out.values]))
    assert ((share > 0.19) & (share < 0.21)).all()


def test_captions_follow_the_grammar_and_survive_encoding():
    for first in range(10):
        for relation in range(2):
            text = data.caption(first, relation, 7)
            assert text == f"{data.DIGIT_WORDS[first]} {('left of', 'above')[relation]} seven"
            ids = data.encode(text)
            assert len(ids) == data.CAPTION_TOKENS and ids[0] == data.START_ID and data.END_ID in ids
            assert data.decode(ids) == text


@pytest.mark.parametrize("text, message", [("three beside four", "beside"), ("one two three four five", "at most 4")])
def test_encode_refuses_other_sentences(text, message):
    with pytest.raises(ValueError, match=message):
        data.encode(text)


def test_the_same_seed_is_the_same_batch():
    digits, _ = data.split_digits()
    one, again, other = (data.make_batch(digits, 16, seed, augment=True) for seed in ([3, 1], [3, 1], [3, 2]))
    assert torch.equal(one.images, again.images) and torch.equal(one.tokens, again.tokens)
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize("axis", [1, 2], ids=["above", "left of"])
def test_relations_are_unambiguous(axis):
    """Along the relation's axis the first digit's ink ends before the second's begins; across it they are level."""
    digits, _ = data.split_digits()
    first, second = digits.pixels[:400], digits.pixels[400:800]
    (start_a, across_a), (start_b, across_b) = data._place(first, second, axis, np.random.default_rng(0))
    ink_a, length_a = data._ink_box(first, axis)
    ink_b, length_b = data._ink_box(second, axis)
    assert (start_a + ink_a >= 0).all() and (start_b + ink_b + length_b <= data.CANVAS).all()
    assert (start_a + ink_a + length_a <= start_b + ink_b).all()
    assert (abs(across_a - across_b) <= 2).all()


def test_compose_keeps_all_ink():
    digits, _ = data.split_digits()
    first, second = digits.pixels[:400], digits.pixels[400:800]
    canvases = data.compose(first, second, np.arange(400) % 2, np.random.default_rng(0))
    # All but the faint borders, which may overlap or stick out.
    ratio = canvases.sum((1, 2)) / (first.sum((1, 2)) + second.sum((1, 2)))
    assert canvases.shape == (400, 16, 16) and ((ratio > 0.97) & (ratio < 1.0001)).all()


def test_warped_digits_stay_digits():
    digits, _ = data.split_digits()
    warped = data.warp(digits.pixels[:200], np.random.default_rng(0))
    assert warped.shape == (200, 8, 8) and warped.min() >= 0 and warped.max() <= 1
    ratio = warped.sum((1, 2)) / digits.pixels[:200].sum((1, 2))
    assert 0.8 < ratio.mean() < 1.2


# Model


def test_a_word_does_not_depend_on_later_words():
    model = Captioner().eval()
    images = torch.rand(2, 16, 16)
    tokens = torch.tensor([data.encode("three left of seven"), data.encode("three above nine")])
    logits = model(images, tokens)
    changed = tokens.clone()
    changed[:, 3:] = data.encode("nine")[1]
    torch.testing.assert_close(model(images, changed)[:, :3], logits[:, :3])


def test_all_parameters_learn():
    model = Captioner()
    digits, _ = data.split_digits()
    batch = data.make_batch(digits, 8, 0)
    model(batch.images, batch.tokens[:, :-1]).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.numel() > 1)
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 200_000


def test_attention_maps_are_the_layers_weights():
    model = Captioner().eval()
    images = torch.rand(3, 16, 16)
    tokens = torch.tensor([data.encode("one above two")] * 3)[:, :4]
    maps = model.attention_maps(images, tokens)
    assert maps.shape == (3, 4, model.config.grid, model.config.grid)
    torch.testing.assert_close(maps.sum((-1, -2)), torch.ones(3, 4))
    with torch.no_grad():
        text, patches = model.interleave(model.encode(images), tokens)
        layer = model.cross.attention
        query = layer.to_q(model.cross.norm(text)).view(3, 4, layer.heads, -1).transpose(1, 2)
        key = layer.to_k(patches).view(3, -1, layer.heads, layer.dim_head).transpose(1, 2)
        weights = (query @ key.transpose(-1, -2) * layer.dim_head**-0.5).softmax(-1).mean(1)
    torch.testing.assert_close(maps.flatten(-2), weights)


def test_generate_stops_at_end():
    model = Captioner().eval()
    with torch.no_grad():
        model.to_words.weight.zero_()
        model.to_words.bias.zero_()
        model.to_words.bias[data.END_ID] = 5.0
    tokens, confidence = model.generate(torch.rand(2, 16, 16))
    assert tokens.tolist() == [[data.START_ID, data.END_ID, 0, 0, 0, 0]] * 2
    assert (confidence[:, 2:] == 1).all() and (confidence[:, 1] < 1).all()


def test_checkpoint_round_trip(tmp_path):
    model = Captioner().eval()
    save_checkpoint(model, tmp_path / "model.pt")
    assert set(torch.load(tmp_path / "model.pt", weights_only=True)) == {"config", "vocabulary", "state_dict"}
    images = torch.rand(2, 16, 16)
    tokens = torch.tensor([data.encode("one above two")] * 2)
    assert torch.equal(load_checkpoint(tmp_path / "model.pt")(images, tokens), model(images, tokens))


# Training


def test_a_few_steps_lower_the_loss(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 25 and 0 <= metrics["accuracy"] <= 1
    assert metrics["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    # Untrained, the loss is about log(16) = 2.8; the grammar alone brings it under 2.
    assert metrics["final_loss"] < 2.4


def test_training_writes_its_pictures(run):
    for name in ("loss_curve.png", "attention_maps.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 300
    assert len(list((run / "samples").glob("*.png"))) == 6


def test_training_says_what_next(run, capsys):
    train._say_what_next(run, sorted((run / "samples").glob("*.png")))
    assert f"caption {run}/samples/1_" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.distributed
def test_under_torchrun_one_rank_speaks_for_both(tmp_path):
    argv = ["train", "--steps", "3", "--batch-size", "32", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, "-m", "mmca_ext.demo", *argv], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("captions exactly right") == 1
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["ranks"] == 2 and metrics["held_out_canvases"] == train.HELD_OUT_CANVASES


def test_evaluation_counts_every_canvas_once():
    _, digits = data.split_digits()
    batch = data.make_batch(digits, 11, 1)
    model = Captioner()
    shares = [train._share(batch, distributed.Ranks(rank, 2, torch.device("cpu")))[1] for rank in (0, 1)]
    assert torch.equal(torch.cat(shares).sort(0).values, batch.tokens.sort(0).values)
    assert train.evaluate(model, batch, distributed.Ranks(0, 1, torch.device("cpu")))[1] == 11


# Captioning


def test_caption_reads_the_samples(run, tmp_path, capsys):
    sample = min((run / "samples").glob("*.png"))
    argv = ["caption", str(sample), "--model", str(run / "model.pt"), "--map", str(tmp_path / "map.png")]
    assert main(argv) == 0
    text, confidence, _ = capsys.readouterr().out.splitlines()
    assert [word for word in confidence.split() if not word[0].isdigit()] == text.split()
    assert (tmp_path / "map.png").stat().st_size > 1000


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "CMYK"])
@pytest.mark.parametrize("dark_on_light", [True, False])
def test_any_image_gives_the_same_canvas(tmp_path, mode, dark_on_light):
    digits, _ = data.split_digits()
    canvas = data.make_batch(digits, 1, 3).images[0].numpy().round()  # black and white, for mode "1"
    picture = Image.fromarray((255 * (1 - canvas if dark_on_light else canvas)).astype(np.uint8)).resize((80, 80), 0)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    picture.save(path)
    (view,) = caption_command.framings(caption_command.read_ink(path))
    np.testing.assert_allclose(view, canvas, atol=0.02)


def test_drawings_on_nothing_are_seen(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[4:28, 8:12] = (0, 0, 0, 255)
    for shade in (0, 255):
        pixels[4:28, 8:12, :3] = shade
        Image.fromarray(pixels).save(tmp_path / "strokes.png")
        ink = caption_command.read_ink(tmp_path / "strokes.png")
        assert ink[10, 10] == 1 and ink[10, 20] == 0


def test_small_drawings_are_brought_to_size():
    ink = np.zeros((200, 300), np.float32)
    ink[90:110, 140:170] = 1
    side_by_side, stacked = caption_command.framings(ink)
    assert (side_by_side > 0.5).any(1).sum() == pytest.approx(8, abs=1)
    assert (stacked > 0.5).any(0).sum() == pytest.approx(16, abs=1)


# Errors: one line on stderr, no traceback


@pytest.fixture
def picture(tmp_path):
    pixels = np.full((40, 40), 255, np.uint8)
    pixels[5:35, 10:14] = 0
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def fails_in_one_line(argv, capsys, *words):
    assert main([str(word) for word in argv]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error


def test_missing_and_bad_images(tmp_path, capsys):
    fails_in_one_line(["caption", tmp_path / "none.png"], capsys, "no such file", "none.png")
    fails_in_one_line(["caption", tmp_path], capsys, "cannot read", "directory")
    (tmp_path / "text.png").write_text("not an image")
    fails_in_one_line(["caption", tmp_path / "text.png"], capsys, "not an image")
    Image.new("L", (20, 20), 255).save(tmp_path / "blank.png")
    fails_in_one_line(["caption", tmp_path / "blank.png"], capsys, "blank")
    (tmp_path / "cut.png").write_bytes((tmp_path / "blank.png").read_bytes()[:45])
    fails_in_one_line(["caption", tmp_path / "cut.png"], capsys, "cannot read")


def test_missing_and_damaged_models(run, tmp_path, picture, capsys):
    path = tmp_path / "model.pt"
    fails_in_one_line(["caption", picture, "--model", path], capsys, "no model at", "demo train")
    whole = (run / "model.pt").read_bytes()
    other = {"config": {"dim": 8}, "vocabulary": [], "state_dict": {}}
    for content in (b"", b"text", whole[: len(whole) // 2], None, [1], {"weights": 1}, other):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        fails_in_one_line(["caption", picture, "--model", path], capsys, "not a model of this demo")


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--batch-size", "0"], ["--threads", "0"], ["--seed", "-1"]])
def test_bad_training_options(argv, tmp_path, capsys):
    fails_in_one_line(["train", *argv, "--out", tmp_path], capsys, argv[0])


def test_output_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fails_in_one_line(["train", "--out", tmp_path / "file"], capsys, "cannot write")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(tmp_path, capsys):
    fails_in_one_line(["train", "--device", "cuda", "--out", tmp_path], capsys, "no CUDA device")


def test_missing_packages_name_the_extra():
    problem.require(torch="torch")
    with pytest.raises(problem.Problem, match=r"needs scikit-learn: pip install mmca_ext\[demo\]"):
        problem.require(torch="torch", no_such_module="scikit-learn")


def test_command_line_as_a_process(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mmca_ext.demo", "caption", str(tmp_path / "none.png")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1 and result.stderr.startswith("mmca_ext.demo caption: no such file")
    assert "Traceback" not in result.stderr
