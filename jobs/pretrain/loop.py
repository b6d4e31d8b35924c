"""The training loop that all parts share, as Ray Train runs it: data-parallel, with checkpoints to go on from."""

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray.train
import torch
from PIL import Image
from ray.train import Checkpoint, CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jobs.pretrain.config import Training
from jobs.pretrain.optimizers import make_optimizers
from jobs.pretrain.pictures import draw_curve
from objdrive.errors import ObjdriveError

_SYNC_EVERY = 8
_NOTE_EVERY = 50
_FLOOR = 0.02


class Stage(Protocol):
    """One part of the base in training, on one worker."""

    @property
    def objective(self) -> nn.Module:
        """Takes a batch, gives a dict of scalars; ``loss`` is what is minimised."""

    @property
    def part(self) -> nn.Module:
        """The trainable module inside the objective: what is averaged, checkpointed and exported."""

    def batch(self, size: int) -> dict[str, Tensor]:
        """Some scenes of this worker's share, on its device."""

    def judge(self, part: nn.Module) -> tuple[dict[str, float], Image.Image]:
        """Figures and sample pictures of the part with averaged weights."""


@dataclass(frozen=True)
class Run:
    """How one stage is run.

    Attributes:
        name: of the stage.
        folder: its checkpoints, curve and sample grids.
        make: makes the stage on a worker, from (device, rank, world).
        training: how.
        workers: data-parallel ranks.
        gpus: per worker.
        threads: of each worker.
        minutes: of this run; a resumed run gets them anew.
        save_every: seconds between checkpoints.
    """

    name: str
    folder: Path
    make: Callable[[torch.device, int, int], Stage]
    training: Training
    workers: int
    gpus: float
    threads: int
    minutes: float
    save_every: float = 300.0


@dataclass
class TrainingProgress:
    """What a run has behind it, over all its resumptions."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def checkpoints(folder: Path) -> Path:
    """Where Ray Train keeps the checkpoints of the stage in a folder."""
    return folder / "checkpoints"


def train(run: Run) -> Path:
    """Train one stage, from its last checkpoint if it has one.

    Returns:
        The folder of the last checkpoint; the averaged weights are its ``ema.safetensors``.

    Raises:
        ObjdriveError: training ended without a checkpoint.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config={"run": run},
        scaling_config=ScalingConfig(
            num_workers=run.workers,
            use_gpu=run.gpus > 0,
            resources_per_worker={"CPU": run.threads, **({"GPU": run.gpus} if run.gpus else {})},
        ),
        # A run of this name goes on from its last checkpoint.
        run_config=RunConfig(
            name=checkpoints(run.folder).name,
            storage_path=str(run.folder.resolve()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    checkpoint = trainer.fit().checkpoint
    if checkpoint is None:
        raise ObjdriveError(f"{run.name}: training ended without a checkpoint")
    return Path(checkpoint.path)


def learning_rate(training: Training, steps: int, done: float) -> float:
    """Warm-up over steps, then level, then down linearly over the last part of the time.

    Args:
        training: how.
        steps: since this run began.
        done: part of the run's time that is over, in [0, 1].
    """
    level = min(1.0, (steps + 1) / training.warmup)
    left = (1 - done) / training.cooldown if training.cooldown else 1.0
    return training.lr * level * max(_FLOOR, min(1.0, left))


def average_decay(training: Training, step: int) -> float:
    """Of the weights' running mean: short at first, so that it forgets where it began."""
    return min(training.ema, (step + 1) / (step + 10))


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without, steps take many times as long as in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def _worker_loop(config: dict[str, Any]) -> None:
    run: Run = config["run"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(run.threads)
    device = get_device()
    stage = run.make(device, rank, world)
    worker = _Worker(run, stage, device, rank, world)
    worker.restore(ray.train.get_checkpoint())
    worker.work()


class _Worker:
    def __init__(self, run: Run, stage: Stage, device: torch.device, rank: int, world: int) -> None:
        self._run, self._stage, self._device, self._rank, self._world = run, stage, device, rank, world
        self._mixed = run.training.bfloat16 and computes_bfloat16(device)
        self._model: Callable[..., dict[str, Tensor]] = (
            prepare_model(stage.objective) if world > 1 or device.type == "cuda" else stage.objective
        )
        if run.training.compile:
            self._model = torch.compile(self._model)
        self._mean = copy.deepcopy(stage.part).eval().requires_grad_(False)
        self._optimizers = make_optimizers(stage.part, run.training)
        self._progress = TrainingProgress()

    def restore(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        with checkpoint.as_directory() as path:
            folder = Path(path)
            self._stage.part.load_state_dict(load_file(folder / "part.safetensors"))
            self._mean.load_state_dict(load_file(folder / "ema.safetensors"))
            states = torch.load(folder / "optimizers.pt", map_location=self._device, weights_only=True)
            for optimizer, state in zip(self._optimizers, states, strict=True):
                optimizer.load_state_dict(state)
            self._progress = TrainingProgress(**json.loads((folder / "progress.json").read_text()))

    def work(self) -> None:
        run, progress = self._run, self._progress
        size = max(1, run.training.batch // self._world)
        began = saved = noted = time.monotonic()
        before = progress.seconds
        done, steps = 0.0, 0
        sums: dict[str, float] = {}
        while True:
            if steps % _SYNC_EVERY == 0:
                now = time.monotonic()
                done, save = self._agree((now - began) / (60 * run.minutes), now - saved > run.save_every)
                progress.seconds = before + now - began
                if done >= 1:
                    break
                if save:
                    self._save()
                    saved = time.monotonic()
            figures = self._step(size, learning_rate(run.training, steps, done))
            steps += 1
            progress.step += 1
            progress.samples += size * self._world
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value
            if steps % _NOTE_EVERY == 0:
                now = time.monotonic()
                means = {name: value / _NOTE_EVERY for name, value in sums.items()}
                self._note(means | {"rate": _NOTE_EVERY * size * self._world / (now - noted)})
                noted, sums = now, {}
        self._save()

    def _step(self, size: int, lr: float) -> dict[str, float]:
        for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        batch = self._stage.batch(size)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
            figures = self._model(batch)
        self._stage.part.zero_grad(set_to_none=True)
        figures["loss"].backward()
        nn.utils.clip_grad_norm_(self._stage.part.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        with torch.no_grad():
            keep = average_decay(self._run.training, self._progress.step)
            torch._foreach_lerp_(list(self._mean.parameters()), list(self._stage.part.parameters()), 1 - keep)
        return {name: float(value.detach()) for name, value in figures.items()}

    def _agree(self, done: float, save: bool) -> tuple[float, bool]:
        """The first worker's clock, for all: none may stop or save while another goes on."""
        if self._world == 1:
            return done, save
        said = torch.tensor([done, float(save)], device=self._device)
        torch.distributed.broadcast(said, src=0)
        return float(said[0]), bool(said[1])

    def _note(self, figures: dict[str, float]) -> None:
        if self._rank:
            return
        progress = self._progress
        line = {"step": progress.step, "samples": progress.samples, "seconds": round(progress.seconds, 1)}
        line |= {name: round(value, 6) for name, value in figures.items()}
        if not math.isfinite(figures["loss"]):
            raise ObjdriveError(
                f"{self._run.name}: the loss is {figures['loss']} at step {progress.step}: lower its lr"
            )
        progress.curve.append(line)
        with (self._run.folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        progress = self._progress
        if self._rank:
            ray.train.report({"step": progress.step})
            return
        figures, picture = self._stage.judge(self._mean)
        draw_curve(progress.curve, "loss").savefig(self._run.folder / "curve.png")
        picture.save(self._run.folder / f"samples-{progress.step:07d}.png")
        with (self._run.folder / "judged.jsonl").open("a") as file:
            file.write(json.dumps({"step": progress.step, "samples": progress.samples, **figures}) + "\n")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file(_plain(self._stage.part), folder / "part.safetensors")
            save_file(_plain(self._mean), folder / "ema.safetensors")
            torch.save([optimizer.state_dict() for optimizer in self._optimizers], folder / "optimizers.pt")
            (folder / "progress.json").write_text(json.dumps(vars(progress)))
            report = {"step": progress.step, "samples": progress.samples, **figures}
            ray.train.report(report, checkpoint=Checkpoint.from_directory(folder))


def _plain(part: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().contiguous().cpu() for name, value in part.state_dict().items()}


def load_matching(part: nn.Module, weights: dict[str, Tensor]) -> None:
    """Take over the weights of the same names and shapes."""
    mine = part.state_dict()
    fitting = {name: value for name, value in weights.items() if name in mine and mine[name].shape == value.shape}
    part.load_state_dict(mine | fitting)
