"""A whole training run: from pictures and a frozen backbone to a head file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fmupsample._version import __version__
from fmupsample.backbones import Backbone
from fmupsample.backbones.views import title
from fmupsample.errors import UsageError
from fmupsample.images.find import Source, printable
from fmupsample.progress import SILENT, Progress
from fmupsample.runs.lock import FolderLock
from fmupsample.threads import cores
from fmupsample.training.cache import plan_crops
from fmupsample.training.config import TrainConfig
from fmupsample.training.distributed import World, describe_hardware, world
from fmupsample.training.feed import Feed
from fmupsample.training.inputs import Given, Say, find_data
from fmupsample.training.loop import Trainer
from fmupsample.training.model import choose_head, make_optimizer
from fmupsample.training.pictures import Pictures
from fmupsample.training.report import CURVE, TrainReport, can_draw_curves
from fmupsample.training.samples import Sampler, Stream
from fmupsample.training.validate import Validator
from fmupsample.training.work import WorkFolder, clear_the_way, work_folder
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.heads import save_head

KEEP_BYTES = 2**30  # memory for decoded pictures and for features, together


def train(
    backbone: Backbone | Sequence[Backbone],
    sources: Sequence[Source],
    output: str | Path,
    config: TrainConfig | None = None,
    *,
    validation: Sequence[Source] = (),
    masks: Sequence[tuple[Path, float]] = (),
    start_from: Path | None = None,
    device: str | torch.device = "auto",
    workers: int | None = None,
    work: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_bytes: int = KEEP_BYTES,
    data: str = "",
    recipe: str = "",
    progress: Progress = SILENT,
    say: Say = lambda _: None,
) -> TrainReport:
    """Train a head on pictures and write it to ``output``, which appears only when complete.

    Args:
        backbone: several take turns, for a head of any backbone.
        sources: pictures to train on; some are kept for validation unless ``validation`` is given.
        masks: folders with an indexed PNG for some pictures, and what each counts, for the
            ``masks`` term.
        start_from: a head file to go on from instead of new parameters.
        workers: threads that decode pictures ahead; ``None``: by the number of processors.
        work: folder for checkpoint, log, curve and previews; default: ``OUTPUT.train``.
        resume: go on from the checkpoint in ``work`` (or begin, if there is none).
        overwrite: begin anew, whatever is there.
        data, recipe: for the card: what the pictures are, the command.
        say: told one line at a time about what is decided.

    Raises:
        UsageError: options, pictures or masks that cannot be used; files in the way.
        HeadError: ``start_from`` is damaged, or made for another backbone.
        TrainingError: the loss is not finite.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint written.
    """
    output = Path(output)
    beside = work_folder(output)
    work = beside if work is None else Path(work)
    if output.suffix != ".safetensors":
        raise UsageError(f"the head {printable(output)} must be named *.safetensors")
    with world(device) as here, _own_randomness(here.device), contextlib.ExitStack() as locks:
        if here.leads:
            # The folder beside the head too: runs with other work folders may write that head.
            for folder in {os.path.realpath(each): each for each in (work, beside)}.values():
                locks.enter_context(FolderLock(folder))
            clear_the_way(output, work, resume=resume, overwrite=overwrite)
        here.wait()
        backbones = list(backbone) if isinstance(backbone, Sequence) else [backbone]
        run = _Run(backbones, here, output, progress, say)
        run.prepare(
            config or TrainConfig(), Given(sources, validation, masks), start_from, work,
            keep_bytes, _default_workers(here.device) if workers is None else workers,
        )  # fmt: skip
        if resume:
            run.go_on()
        return run.run(data, recipe)


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leave PyTorch's random numbers and its precision of products as they were."""
    devices = [device] if device.type == "cuda" else []
    before = torch.get_float32_matmul_precision()
    with torch.random.fork_rng(devices=devices):
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _default_workers(device: torch.device) -> int:
    # On the CPU, decoding and computing share the cores.
    return max(1, min(4, cores() // 2 if device.type == "cpu" else cores() - 1))


class _Run:
    def __init__(
        self,
        backbones: list[Backbone],
        here: World,
        output: Path,
        progress: Progress,
        say: Say,
    ) -> None:
        self.backbones, self.backbone = backbones, backbones[0]
        self.here, self.output, self.progress = here, output, progress
        self.say = say if here.leads else lambda _: None
        self.warn = progress.warn if here.leads else lambda _: None
        self.resumed_at = 0

    # -- everything that training needs -----------------------------------------------------------

    def prepare(
        self,
        config: TrainConfig,
        given: Given,
        start_from: Path | None,
        work: Path,
        keep_bytes: int,
        workers: int,
    ) -> None:
        here, backbone = self.here, self.backbone
        head, config = choose_head(config, self.backbones, start_from)
        self.config = config = config.resolve(backbone, here.device)
        self.data = data = find_data(given, config, self.warn, self.say)
        kept = 0
        if len(self.backbones) == 1 or config.crops_kept is not None:
            kept = plan_crops(config, backbone, len(data.training), here.size, keep_bytes // 2)
        pictures = self._pictures(data.training, keep_bytes // 2 if kept else keep_bytes)
        sampler = Sampler(config, len(pictures), kept)
        stream = Stream(
            pictures, sampler, config.batch_size, rank=here.rank, world=here.size, workers=workers
        )
        share = keep_bytes // 2 // len(self.backbones) if kept else 0
        self.feeds = [
            Feed(each, replace(config, image_sizes=self._sizes(each)), here, share)
            for each in self.backbones
        ]
        head = head.to(here.device)
        here.share(list(head.state_dict().values()))
        held = self._pictures(data.held, keep_bytes)
        identity = data.identity(self.backbones, here.size)
        self.work = WorkFolder(work, config, identity, self.feeds, held)
        validator = None
        if data.held and here.leads:
            validator = Validator(self.feeds, held, Sampler(config, len(held)))
        optimizer = make_optimizer(head, config)
        self.trainer = Trainer(
            head, self.feeds, optimizer, config, here, stream, self.work, validator, self.progress
        )
        # The averaged weights, which are judged and saved, keep the head's whole configuration.
        for name in head.late if config.late_prior else ():
            head.config = replace(head.config, **{name: None})
        self._tell_plan(kept)

    def _pictures(self, squares: list, keep_bytes: int) -> Pictures:
        return Pictures(
            squares,
            self.config.side,
            regions=self.config.regions,
            keep_bytes=keep_bytes,
            warn=self.warn,
        )

    def _sizes(self, backbone: Backbone) -> tuple[int, ...] | None:
        """Of crops for a backbone: as many cells as the first has, or what it takes alone."""
        if backbone.fixed_size is not None:
            return None
        share = backbone.stride[0] / self.backbone.stride[0]
        return tuple(round(size * share) for size in self.config.image_sizes)

    def _tell_plan(self, kept: int) -> None:
        config, names = self.config, ", ".join(map(title, self.backbones))
        all_sizes = dict.fromkeys(size for feed in self.feeds for size in feed.sizes)
        sizes = " and ".join(f"{s}x{s}" for s in all_sizes)
        several = f" in each of {self.here.size} processes" if self.here.size > 1 else ""
        crops = f", {kept} crops of each, their features kept" if kept else ""
        shown = getattr(self.backbone, "views", 1)
        passes = f"; {shown} passes of the backbone for every crop" if shown > 1 else ""
        self.say(
            f"training {config.upsampler} for {names} on {self.data.pictures} pictures "
            f"({len(self.data.held)} more held out){crops}: {config.steps} steps of "
            f"{config.batch_size} crops of {sizes} pixels{several}, objective "
            + " + ".join(f"{weight:g} {name}" for name, weight in config.terms.items())
            + passes
        )
        if not can_draw_curves():
            self.say(f"{CURVE} is not drawn without matplotlib: pip install 'fmupsample[train]'")

    # -- running ----------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Take up the checkpoint in the work folder, if there is one."""
        trainer = self.trainer
        if not self.work.load_into(trainer):
            self.say(f"nothing to go on from in {printable(self.work.path)}: beginning")
            return
        self.resumed_at = trainer.step
        self.say(f"going on after step {trainer.step} of {self.config.steps}")

    def run(self, data: str, recipe: str) -> TrainReport:
        trainer, here = self.trainer, self.here
        if here.leads:
            self.work.begin(trainer.step)
        if not self.resumed_at:
            stream = trainer.stream
            for feed in self.feeds:
                feed.fit(stream.pictures, stream.sampler, self.progress)
        trainer.run()
        report = TrainReport(
            output=self.output,
            work=self.work.path,
            config=self.config,
            parameters=sum(p.numel() for p in trainer.head.parameters()),
            pictures=self.data.pictures,
            held_out=len(self.data.held),
            best_step=self.config.steps,
            seconds=trainer.seconds,
            resumed_at=self.resumed_at,
            leads=here.leads,
        )
        if here.leads:
            self._write_head(self._best_head(report), report, data, recipe)
        here.wait()
        return report

    def _best_head(self, report: TrainReport) -> Upsampler:
        """The averaged weights that did best on held-out pictures, or the last ones."""
        average, best = self.trainer.average, self.trainer.best
        if best is not None:
            average.load_state_dict(best.state)
            report.best_step, report.score = best.step, best.score
        return average

    def _write_head(self, head: Upsampler, report: TrainReport, data: str, recipe: str) -> None:
        labels = "with labels" if self.data.labelled else "no labels"
        report.card = {
            "data": f"{data or f'{report.pictures} pictures'}; {labels}",
            "pictures": report.pictures,
            "held_out_pictures": report.held_out,
            "recipe": recipe,
            "steps": self.config.steps,
            "best_step": report.best_step,
            "seed": self.config.seed,
            "hardware": describe_hardware(self.here),
            "seconds": round(report.seconds),
            "held_out": None if report.score is None else report.score.to_json(),
            "fmupsample": __version__,
            "config": self.config.to_dict(),
        }
        self.output.parent.mkdir(parents=True, exist_ok=True)
        backbone = self.backbone
        if head.config.channels == 0:
            names = [f"{title(each)}, layer {each.layer}" for each in self.backbones]
            report.card["backbones"], backbone = names, None
        save_head(self.output, head, backbone, report.card)
