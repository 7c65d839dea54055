"""Train the captioner, measure it on digits it has never seen, and draw what it looks at."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

import mmca_ext

from . import data, distributed
from .model import Captioner, save_checkpoint
from .problem import Problem, require

HELD_OUT_SEED = 2**31  # no training step's seed has this first part
HELD_OUT_CANVASES = 2000
CHECKS = 6  # looks at the held-out digits on the way, for the picture; nothing is chosen by them


def add_arguments(parser):
    parser.add_argument("--steps", type=int, default=900, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--batch-size", type=int, default=128, help="canvases per step, over all ranks")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the results")
    # One by default: two make it faster by half on idle cores, and several times slower on busy ones, where each of the
    # many short parallel regions waits for a thread that is not running. And one gives the same numbers everywhere.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each rank")


def run(options) -> dict:
    """The command: trains, writes everything to options.out, says where; returns what metrics.json holds."""
    _check(options)
    ranks = distributed.start(options.device)
    try:
        return _run(options, ranks)
    finally:
        distributed.stop()


def _check(options) -> None:
    require(sklearn="scikit-learn", matplotlib="matplotlib", tqdm="tqdm", PIL="pillow")
    for name in ("steps", "batch_size", "threads"):
        if getattr(options, name) < 1:
            raise Problem(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.seed < 0:
        raise Problem(f"--seed must not be negative, got {options.seed}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch_size % world:
        raise Problem(f"--batch-size must be a multiple of the {world} ranks, got {options.batch_size}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Problem("--device cuda: torch sees no CUDA device")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"cannot write to {options.out}: {error.strerror}") from None


def _run(options, ranks) -> dict:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = Captioner().to(ranks.device)
    train_digits, held_out_digits = data.split_digits()
    held_out = data.make_batch(held_out_digits, HELD_OUT_CANVASES, HELD_OUT_SEED)
    if ranks.is_main:
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{len(train_digits.values)} digits to learn from, {len(held_out_digits.values)} held out; "
            f"{parameters:,} parameters; {_place(ranks, options.dtype)}"
        )

    started = time.perf_counter()
    losses, checks = fit(model, train_digits, held_out, options, ranks)
    seconds = time.perf_counter() - started
    exact, count = evaluate(model, held_out, ranks, options.dtype)
    accuracy = exact / count

    metrics = {
        "accuracy": accuracy,
        "held_out_canvases": count,
        "final_loss": sum(losses[-50:]) / len(losses[-50:]),
        "steps": options.steps,
        "seconds": round(seconds, 1),
        "seed": options.seed,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "device": options.device,
        "dtype": options.dtype,
        "ranks": ranks.world,
        "threads": options.threads,
        "versions": {
            "mmca_ext": mmca_ext.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "scikit-learn")},
        },
    }
    if ranks.is_main:
        print(f"trained {options.steps} steps in {seconds:.0f} s")
        print(f"held-out accuracy {accuracy:.3f}: {exact} of {count} captions exactly right, all on unseen digits")
        sample_paths = _write(options.out, model, held_out, losses, [*checks, (options.steps, accuracy)], metrics)
        _say_what_next(options.out, sample_paths)
    return metrics


def fit(model, digits, held_out, options, ranks):
    """Trains in place. Returns the loss of each step and (step, held-out accuracy) pairs, on the main rank."""
    from tqdm import tqdm

    parallel = distributed.wrap(model, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warm_up = min(30, options.steps)

    def schedule(step):  # linear up, then half a cosine down to 0
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / options.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    check_at = {round(options.steps * part / CHECKS) for part in range(1, CHECKS)}
    few = data.Batch(held_out.images[:256], held_out.tokens[:256])
    losses, checks = [], []
    bar = tqdm(
        range(1, options.steps + 1),
        desc="training",
        unit="step",
        disable=not ranks.is_main,
        # On a terminal it moves; in a log file it leaves a line now and then.
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    model.train()
    for step in bar:
        # Every rank makes the whole batch and takes its share, so the data do not depend on the number of ranks.
        batch = data.make_batch(digits, options.batch_size, [options.seed, step], augment=True)
        images, tokens = _share(batch, ranks)
        with _autocast(ranks.device, options.dtype):
            logits = parallel(images, tokens[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=data.PAD_ID)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step in check_at:
            exact, count = evaluate(model, few, ranks, options.dtype)
            checks.append((step, exact / count))
            model.train()
    return [loss.item() for loss in losses], checks


def evaluate(model, batch, ranks, dtype="fp32") -> tuple[int, int]:
    """(exactly right, all): greedy captions of a batch, shared out over the ranks and summed."""
    model.eval()
    images, tokens = _share(batch, ranks)
    exact = 0
    with _autocast(ranks.device, dtype):
        for some, truth in zip(images.split(500), tokens.split(500), strict=True):
            written, _ = model.generate(some)
            exact += (written == truth).all(1).sum().item()
    exact, count = distributed.total([exact, len(images)], ranks)
    return int(exact), int(count)


def _share(batch, ranks):
    return [tensor[ranks.rank :: ranks.world].to(ranks.device) for tensor in batch]


def _autocast(device, dtype):
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()


def _place(ranks, dtype) -> str:
    if ranks.device.type == "cuda":
        name = torch.cuda.get_device_name(ranks.device)
    else:
        threads = torch.get_num_threads()
        name = f"CPU with {threads} thread{'s' * (threads > 1)}"
    return f"{name}, {dtype}" + (f", {ranks.world} ranks" if ranks.world > 1 else "")


def _write(out: Path, model, held_out, losses, checks, metrics) -> list[Path]:
    from . import pictures

    model = model.float().cpu().eval()
    save_checkpoint(model, out / "model.pt")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    pictures.loss_curve(losses, checks, out / "loss_curve.png")
    # The first six canvases, whatever the model makes of them.
    images, tokens = held_out.images[:6], held_out.tokens[:6]
    truths = [data.decode(row) for row in tokens]
    written, _ = model.generate(images)
    maps = model.attention_maps(images, written[:, :-1]).numpy()
    captions = [data.decode(row) for row in written]
    path = out / "attention_maps.png"
    pictures.attention_maps(images.numpy(), truths, captions, maps, model.config.stride, path)
    return pictures.samples(images.numpy(), truths, out / "samples")


def _say_what_next(out: Path, samples: list[Path]) -> None:
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    elif shutil.which("python") == sys.executable:
        python = "python"
    model = "" if out == Path("demo_output") else f" --model {out / 'model.pt'}"
    print(
        f"\nin {out}/\n"
        "  attention_maps.png  which patches each word looked at\n"
        "  loss_curve.png      loss and held-out accuracy by step\n"
        "  samples/            images of held-out digits, named by what they show\n"
        "  model.pt, metrics.json\n"
        "\nnext, caption an image (also one of your own: two digits, any size or colours):\n"
        f"  {python} -m mmca_ext.demo caption {samples[0]}{model}"
    )
