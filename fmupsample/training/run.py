"""A whole training run: from pictures and a frozen backbone to a head file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmupsample._version import __version__
from fmupsample.analysis.pca import PCABasis
from fmupsample.atomic import replacing
from fmupsample.backbones import Backbone
from fmupsample.backbones.views import title
from fmupsample.errors import OutputError, UsageError
from fmupsample.folders import holds_keys, refuse_others_files
from fmupsample.images.find import Source, printable
from fmupsample.labels import count_classes
from fmupsample.labels.matching import find_labels
from fmupsample.progress import SILENT, Progress
from fmupsample.runs.lock import FolderLock
from fmupsample.threads import cores
from fmupsample.training.cache import plan_crops
from fmupsample.training.checkpoint import NAME as CHECKPOINT
from fmupsample.training.checkpoint import (
    content_mark,
    damaged,
    load_checkpoint,
    save_checkpoint,
)
from fmupsample.training.config import TrainConfig
from fmupsample.training.data import (
    LabelFile,
    Pictures,
    Sampler,
    Square,
    Stream,
    list_squares,
    split_squares,
    validation_squares,
)
from fmupsample.training.distributed import World, world
from fmupsample.training.feed import Feed
from fmupsample.training.loop import Trainer
from fmupsample.training.model import Model, check_trainable, make_optimizer
from fmupsample.training.objective import LABELLED
from fmupsample.training.report import (
    CURVE,
    LOG,
    PREVIEWS,
    Log,
    draw_curve,
    draw_preview,
    save_picture,
)
from fmupsample.training.validate import Score, Validator
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.heads import load_head, save_head
from fmupsample.upsamplers.registry import METHODS, any_backbone_names, either, learned_method

CONFIG = "config.json"
KEEP_BYTES = 2**30  # memory for decoded pictures and for features, together

Say = Callable[[str], None]


@dataclass
class TrainReport:
    """What became of a run.

    Attributes:
        output: the head file.
        score: held-out losses of the weights in it; ``None`` without validation pictures.
        best_step: after how many steps those weights were taken.
        pictures, held_out: how many were trained and validated on.
        seconds: of training, with validations, over all interruptions.
        leads: false in processes that only helped: they have nothing to tell.
    """

    output: Path
    work: Path
    config: TrainConfig
    parameters: int
    pictures: int
    held_out: int
    best_step: int = 0
    score: Score | None = None
    seconds: float = 0.0
    resumed_at: int = 0
    card: dict[str, Any] = field(default_factory=dict)
    leads: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON summary."""
        return {
            "output": printable(self.output),
            "work": printable(self.work),
            "upsampler": self.config.upsampler,
            "parameters": self.parameters,
            "pictures": self.pictures,
            "held_out_pictures": self.held_out,
            "steps": self.config.steps,
            "resumed_at": self.resumed_at,
            "best_step": self.best_step,
            "held_out": None if self.score is None else self.score.to_json(),
            "better_than_bilinear": None if self.score is None else self.score.better,
            "seconds": round(self.seconds, 1),
            "seconds_per_step": round(self.seconds / self.config.steps, 4),
            "config": self.config.to_dict(),
        }


def work_folder(output: Path) -> Path:
    """Where a run keeps its checkpoint, log and pictures: beside the head."""
    return output.with_name(f"{output.name}.train")


def train(
    backbone: Backbone | Sequence[Backbone],
    sources: Sequence[Source],
    output: str | Path,
    config: TrainConfig | None = None,
    *,
    validation: Sequence[Source] = (),
    labels: Sequence[Path] = (),
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
        labels: folders with an indexed PNG for each picture, for the ``task`` term.
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
        UsageError: options, pictures or labels that cannot be used; files in the way.
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
            _clear_the_way(output, work, resume=resume, overwrite=overwrite)
        here.wait()
        backbones = list(backbone) if isinstance(backbone, Sequence) else [backbone]
        run = _Run(backbones, here, output, work, progress, say if here.leads else lambda _: None)
        run.prepare(
            config or TrainConfig(), sources, validation, labels, masks, start_from, keep_bytes,
            _default_workers(here.device) if workers is None else workers,
        )  # fmt: skip
        if resume:
            run.go_on()
        return run.run(data, recipe)


def _find_label_files(
    config: TrainConfig,
    labels: Sequence[Path],
    masks: Sequence[tuple[Path, float]],
    sources: Sequence[Source],
) -> dict[Source, LabelFile]:
    """The labels that the terms ask for: of all pictures for ``task``, else of some."""
    wanted = LABELLED & set(config.terms)
    if "task" in wanted and not labels:
        raise UsageError("--objective task needs --labels FOLDER")
    if wanted and not (labels or masks):
        raise UsageError("--objective masks needs --masks FOLDER")
    if labels and masks:
        raise UsageError("give --labels or --masks: with --labels the masks term takes those")
    if (labels or masks) and not wanted:
        raise UsageError(
            "--labels is for --objective task and --masks for masks; no other term looks at labels"
        )
    files: dict[Source, LabelFile] = {}
    if labels:
        found = find_labels(labels, sources, of_all="task" in wanted)
        return {source: LabelFile(path) for source, path in found.items()}
    for folder, weight in masks:
        found = find_labels([folder], sources, of_all=False)
        files = {source: LabelFile(path, weight) for source, path in found.items()} | files
    return files


def _clear_the_way(output: Path, work: Path, *, resume: bool, overwrite: bool) -> None:
    if overwrite and resume:
        raise UsageError("--resume and --overwrite exclude each other; give one of them")
    refuse_others_files(
        work, (CONFIG, LOG, CURVE), ours=holds_keys(work / CONFIG, "objective", "steps"),
        instead="choose another folder with --work",
    )  # fmt: skip
    if overwrite:
        for name in (CHECKPOINT, LOG, CURVE, CONFIG):
            (work / name).unlink(missing_ok=True)
        for path in (work / PREVIEWS).glob("step-*-*.png"):
            path.unlink()
        with contextlib.suppress(OSError):  # not there, or with files of others
            (work / PREVIEWS).rmdir()
        return
    if resume:
        return
    if output.exists():
        raise UsageError(f"{printable(output)} exists; --overwrite trains it anew")
    if (work / CHECKPOINT).exists():
        raise UsageError(
            f"{printable(work)} holds an unfinished run: --resume goes on with it, --overwrite "
            "begins anew"
        )


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
        backbones: Sequence[Backbone],
        here: World,
        output: Path,
        work: Path,
        progress: Progress,
        say: Say,
    ) -> None:
        self.backbones, self.backbone = list(backbones), backbones[0]
        self.here, self.output, self.work = here, output, work
        self.progress, self.say = progress, say
        self.log = Log(work / LOG)
        self.previews: list[tuple[Any, Tensor, Tensor]] | None = None

    # -- everything that training needs -----------------------------------------------------------

    def prepare(
        self,
        config: TrainConfig,
        sources: Sequence[Source],
        validation: Sequence[Source],
        labels: Sequence[Path],
        masks: Sequence[tuple[Path, float]],
        start_from: Path | None,
        keep_bytes: int,
        workers: int,
    ) -> None:
        here, backbone = self.here, self.backbone
        head, config = self._head(config, start_from)
        self.config = config = config.resolve(backbone, here.device)
        files = _find_label_files(config, labels, masks, [*sources, *validation])
        self.labelled = bool(files)
        squares, held = self._squares(sources, validation, files)
        self.pictures_used = len({square.source for square in squares})
        self.held_out = len(held)
        self.identity = self._identify([*squares, *held])
        classes = 0
        if "task" in config.terms:
            classes = count_classes([file.path for file in files.values()])

        views = 0
        if len(self.backbones) == 1 or config.crops_kept is not None:
            views = plan_crops(config, backbone, len(squares), here.size, keep_bytes // 2)
        workers_warn = self.progress.warn if here.leads else (lambda _: None)
        share = keep_bytes // 2 if views else keep_bytes
        pictures = Pictures(
            squares, config.side, regions=config.regions, keep_bytes=share, warn=workers_warn
        )
        self.sampler = Sampler(config, len(squares), views)
        self.stream = Stream(
            pictures,
            self.sampler,
            config.batch_size,
            rank=here.rank,
            world=here.size,
            workers=workers,
        )
        share = keep_bytes // 2 // len(self.backbones) if views else 0
        self.feeds = [
            Feed(each, replace(config, image_sizes=self._sizes(each)), here, share)
            for each in self.backbones
        ]
        model = Model(head, backbone.channels, classes).to(here.device)
        here.share(list(model.state_dict().values()))
        validator = None
        if held and here.leads:
            held_pictures = Pictures(
                held, config.side, regions=config.regions, keep_bytes=keep_bytes, warn=workers_warn
            )
            self.held_pictures = held_pictures
            validator = Validator(self.feeds, held_pictures, Sampler(config, len(held)))
        self.trainer = Trainer(
            model,
            self.feeds,
            make_optimizer(model, config),
            config,
            here,
            self.stream,
            validator=validator,
            save=self._save,
            log=self.log.add,
            validated=self._draw,
            progress=self.progress,
        )
        # The averaged weights, which are judged and saved, keep the head's whole configuration.
        for name in head.late if config.late_prior else ():
            head.config = replace(head.config, **{name: None})
        self.resumed_at = 0
        self.say(self._plan(views))

    def _head(self, config: TrainConfig, start_from: Path | None) -> tuple[Upsampler, TrainConfig]:
        """The head to train, and the options with what it is."""
        backbone, several = self.backbone, len(self.backbones) > 1
        torch.manual_seed(config.seed)
        universals = any_backbone_names()
        method = learned_method(config.upsampler)
        for_any = config.upsampler in universals and (
            several or not method.own_heads or config.upsampler_config.get("channels") == 0
        )
        if start_from is not None:
            head = load_head(start_from, backbone).train().requires_grad_(True)
            if config.upsampler not in (*universals, head.name):
                raise UsageError(
                    f"{printable(start_from)} holds a {head.name}, which cannot become a "
                    f"{config.upsampler}: leave --upsampler away"
                )
            if METHODS[head.name].own_heads and head.config.channels == 0 and not for_any:
                head = head.specialised(backbone.channels).train()
            wanted = {**head.config.to_dict(), **config.upsampler_config}
            if wanted != head.config.to_dict():
                raise UsageError("upsampler_config: a head to go on from keeps its own")
        else:
            if several and config.upsampler not in universals:
                raise UsageError(
                    f"several backbones are for --upsampler {either(universals)}; "
                    f"{config.upsampler} is trained for one"
                )
            channels = 0 if for_any else backbone.channels
            head = method.build({"channels": channels, **config.upsampler_config})
        for each in self.backbones:
            check_trainable(head, each.stride)
        if getattr(head.config, "channels", 0) not in (0, backbone.channels):
            raise UsageError(
                f"upsampler_config: channels must be {backbone.channels}, as {backbone.name} has"
            )
        if head.config.channels == 0 and "task" in config.terms:
            raise UsageError("--objective task is for a head of one backbone")
        if not head.linear_in_value and "masks" in config.terms:
            raise UsageError(
                f"--objective masks is for upsamplers with kernel weights; {head.name} has none"
            )
        # The whole of the head's configuration is recorded, not only what was asked for.
        return head, replace(config, upsampler=head.name, upsampler_config=head.config.to_dict())

    def _sizes(self, backbone: Backbone) -> tuple[int, ...] | None:
        """Of crops for a backbone: as many cells as the first has, or what it takes alone."""
        if backbone.fixed_size is not None:
            return None
        share = backbone.stride[0] / self.backbone.stride[0]
        return tuple(round(size * share) for size in self.config.image_sizes)

    def _squares(
        self,
        sources: Sequence[Source],
        validation: Sequence[Source],
        files: dict[Source, LabelFile],
    ) -> tuple[list[Square], list[Square]]:
        smallest = min(self.config.image_sizes) // 2
        warn = self.progress.warn if self.here.leads else (lambda _: None)
        find = partial(list_squares, smallest=smallest, labels=files, warn=warn)
        if not validation:
            return split_squares(find(sources), self.config.held_out)
        kept = {os.path.realpath(source.path) for source in validation}
        training = [s for s in sources if os.path.realpath(s.path) not in kept]
        if len(training) < len(sources):
            self.say(f"{len(sources) - len(training)} pictures are kept for validation only")
        held = find(validation, purpose="validation", least=1)
        return find(training), validation_squares(held)

    def _identify(self, squares: Sequence[Square]) -> str:
        """What a checkpoint must agree with besides the options."""
        paths = {path for s in squares for path in (s.source.path, s.labels) if path}
        marks = {path: content_mark(path) for path in paths}
        what = [
            self.here.size, [[each.fingerprint, each.layer] for each in self.backbones],
            [[str(s.source.relative), s.size, s.part, marks[s.source.path],
              s.labels and marks[s.labels], s.label_weight] for s in squares],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def _plan(self, views: int) -> str:
        config, names = self.config, ", ".join(map(title, self.backbones))
        all_sizes = dict.fromkeys(size for feed in self.feeds for size in feed.sizes)
        sizes = " and ".join(f"{s}x{s}" for s in all_sizes)
        several = f" in each of {self.here.size} processes" if self.here.size > 1 else ""
        kept = f", {views} crops of each, their features kept" if views else ""
        shown = getattr(self.backbone, "views", 1)
        passes = f"; {shown} passes of the backbone for every crop" if shown > 1 else ""
        return (
            f"training {config.upsampler} for {names} on {self.pictures_used} pictures "
            f"({self.held_out} more held out){kept}: {config.steps} steps of {config.batch_size} "
            f"crops of {sizes} pixels{several}, objective "
            + " + ".join(f"{weight:g} {name}" for name, weight in config.terms.items())
            + passes
        )

    # -- running ----------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Take up the checkpoint in the work folder, if there is one."""
        path = self.work / CHECKPOINT
        if not path.exists():
            self.say(f"nothing to go on from in {printable(self.work)}: beginning")
            return
        state = load_checkpoint(path, self.config, self.identity)
        try:
            self.trainer.load(state)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UsageError(damaged(path)) from error
        self.resumed_at = self.trainer.step
        self.say(f"going on after step {self.trainer.step} of {self.config.steps}")

    def run(self, data: str, recipe: str) -> TrainReport:
        trainer, here = self.trainer, self.here
        if here.leads:
            self._write_config()
            self.log.begin(trainer.step)
        if not self.resumed_at:
            for feed in self.feeds:
                feed.fit(self.stream.pictures, self.sampler, self.progress)
        trainer.run()
        report = TrainReport(
            output=self.output,
            work=self.work,
            config=self.config,
            parameters=sum(p.numel() for p in trainer.model.head.parameters()),
            pictures=self.pictures_used,
            held_out=self.held_out,
            best_step=self.config.steps,
            seconds=trainer.seconds,
            resumed_at=self.resumed_at,
            leads=here.leads,
        )
        if here.leads:
            self._finish(report, data, recipe)
        here.wait()
        return report

    def _finish(self, report: TrainReport, data: str, recipe: str) -> None:
        average, best = self.trainer.average, self.trainer.best
        if best is not None:
            average.load_state_dict(best.state)
            report.best_step, report.score = best.step, best.score
        labels = "with labels" if self.labelled else "no labels"
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
        universal = average.head.config.channels == 0
        if universal:
            report.card["backbones"] = [
                f"{title(each)}, layer {each.layer}" for each in self.backbones
            ]
        backbone = None if universal else self.backbone
        save_head(self.output, average.head, backbone, report.card)

    # -- what it leaves behind --------------------------------------------------------------------

    def _write_config(self) -> None:
        path = self.work / CONFIG
        try:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(self.config.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise OutputError(
                f"{printable(path)} cannot be written: {error.strerror or error}"
            ) from error

    def _save(self, state: dict[str, Any]) -> None:
        save_checkpoint(self.work / CHECKPOINT, self.config, self.identity, state)

    def _draw(self, trainer: Trainer) -> None:
        """The curve and the previews, after a validation."""
        save_picture(self.work / CURVE, draw_curve(self.log.read(), self.config.steps))
        if self.previews is None:
            self.previews = self._choose_previews()
        head = trainer.average.head.eval()
        for number, (feed, basis, pixels, image, features) in enumerate(self.previews, 1):
            head.use_with(feed.backbone.mean, feed.backbone.std)
            note = f"{title(feed.backbone)}, step {trainer.step} of {self.config.steps}"
            panel = draw_preview(pixels, image, features, head, basis, note)
            save_picture(self.work / PREVIEWS / f"step-{trainer.step:06}-{number}.png", panel)

    def _choose_previews(self) -> list[tuple]:
        """Some held-out squares, whole, with their features; one after another of the backbones.
        The colours are those of all squares of a backbone together."""
        count = min(self.config.previews, self.held_out)
        if not count:
            return []
        chosen = [
            (feed := self.feeds[n % len(self.feeds)],
             *feed.view(self.held_pictures.load(square), self.config.side))
            for n, square in enumerate(range(0, self.held_out, -(-self.held_out // count)))
        ]  # fmt: skip
        bases = {}
        for feed in {id(feed): feed for feed, *_ in chosen}.values():
            own = [features[0].flatten(1).T for f, _, _, features in chosen if f is feed]
            bases[id(feed)] = PCABasis.fit(torch.cat(own))
        return [(feed, bases[id(feed)], *rest) for feed, *rest in chosen]


def describe_hardware(here: World) -> str:
    """``2 x NVIDIA H100``, or the processor and its threads."""
    if here.device.type == "cuda":
        name = torch.cuda.get_device_name(here.device)
        return f"{here.size} x {name}" if here.size > 1 else name
    model = "CPU"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    several = f" in each of {here.size} processes" if here.size > 1 else ""
    return f"{model}, {torch.get_num_threads()} threads{several}"
