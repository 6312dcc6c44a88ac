"""What is measured: our parts, and what they are compared with, in one setting."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.bench.measuring import Apart, Case, Here, OutOfMemory
from fmupsample.device import is_out_of_memory
from fmupsample.ops import reassemble
from fmupsample.ops.backend import get_backend, set_backend
from fmupsample.upsamplers import JointBilateral, ReSFU, ReSFUConfig

TESTS = Path(__file__).parents[2] / "tests"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLASSES = 21  # masks of the value-first case

# Widths of common ViTs; the patch size is set to the ratio.
BACKBONES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch14_dinov2",
    768: "vit_base_patch14_dinov2",
}
# On a CPU, attention over more tokens than this takes a minute and says nothing about upsampling.
MOST_CPU_TOKENS = 6000
# The definition needs many maps of the output's size, and minutes on larger ones.
MOST_LITERAL_PIXELS = 448 * 448


@dataclass(frozen=True)
class Setting:
    """Sizes of one comparison: square pictures, on a whole number of cells."""

    size: int = 448  # pixels of a side; rounded to a multiple of the ratio
    channels: int = 384
    ratio: int = 14
    batch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.cells * self.ratio)

    @property
    def cells(self) -> int:
        return max(1, round(self.size / self.ratio))

    def output_bytes(self, dtype: str) -> int:
        return self.batch * self.channels * self.size**2 * DTYPES[dtype].itemsize

    def __str__(self) -> str:
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.size} px, C = {self.channels}, ratio {self.ratio}{batch}"


class Workload:
    """The inputs of one setting with random numbers, and the cases on them.

    Only what a case needs is made: :meth:`case` prepares and returns a function of no arguments.
    Names end in the dtype of the features, as in ``"reassembly bf16"``.
    """

    def __init__(self, setting: Setting, device: torch.device):
        self.setting, self.device = setting, device
        generator = torch.Generator().manual_seed(0)
        s = setting
        self.x = torch.randn(s.batch, s.channels, s.cells, s.cells, generator=generator).to(device)
        self.image = torch.randn(s.batch, 3, s.size, s.size, generator=generator).to(device)
        torch.manual_seed(0)
        self.head = ReSFU(ReSFUConfig(channels=s.channels)).eval().to(device)

    def case(self, name: str) -> Case:
        what, _, dtype = name.rpartition(" ")
        return _CASES[what](self, dtype)

    def features(self, dtype: str) -> Tensor:
        return self.x.to(DTYPES[dtype])

    def weights(self, dtype: str) -> Tensor:
        """Random kernel weights, in the dtype in which the head gives them for such features."""
        s, made = self.setting, self._made_weights
        if dtype not in made:
            small = 2 * s.ratio
            with torch.no_grad():
                given = self.head.kernels(
                    self.features(dtype)[:1, :, :2, :2], self.image[:1, :, :small, :small]
                ).dtype
            scores = torch.randn(s.batch, 9, s.size, s.size, device=self.device)
            made[dtype] = scores.softmax(1).to(given)
        return made[dtype]

    @cached_property
    def _made_weights(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def backbone(self) -> nn.Module:
        import timm  # here: most cases do not need it, and each has a process of its own

        s = self.setting
        model = timm.create_model(
            BACKBONES[s.channels],
            pretrained=False,
            num_classes=0,
            img_size=s.size,
            patch_size=s.ratio,
        )
        return model.eval().to(self.device)


def moved_bytes(setting: Setting, dtypes: Iterable[str], device: torch.device) -> dict[str, int]:
    """What reassembly must move: features and weights read once, the output written once."""
    small = Workload(Setting(2 * setting.ratio, setting.channels, setting.ratio), device)
    s = setting
    return {
        dtype: s.batch * s.channels * s.cells**2 * DTYPES[dtype].itemsize
        + s.batch * 9 * s.size**2 * small.weights(dtype).element_size()
        + s.output_bytes(dtype)
        for dtype in dtypes
    }


def _backbone(work: Workload, dtype: str) -> Case:
    """As the pipeline runs it: weights in float32, arithmetic in ``dtype``."""
    model, image = work.backbone, work.image

    def run() -> Tensor:
        with (
            torch.no_grad(),
            torch.autocast(work.device.type, DTYPES[dtype], enabled=dtype != "fp32"),
        ):
            return model.forward_features(image)

    return run


def _copy(work: Workload, dtype: str) -> Case:
    s = work.setting
    # Ones, not zeros: untouched zero pages would be read from the cache.
    source = torch.ones(
        s.batch, s.channels, s.size, s.size, dtype=DTYPES[dtype], device=work.device
    )
    return source.clone


def _bilinear(work: Workload, dtype: str) -> Case:
    x, size = work.features(dtype), (work.setting.size,) * 2
    return lambda: F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _joint_bilateral(work: Workload, dtype: str) -> Case:
    x, image, jbu = work.features(dtype), work.image, JointBilateral()
    return torch.no_grad()(lambda: jbu(x, image))


def _reassembly(work: Workload, dtype: str) -> Case:
    x, weights = work.features(dtype), work.weights(dtype)
    return lambda: reassemble(x, weights)


def _kernel_weights(work: Workload, dtype: str) -> Case:
    x, image, head = work.features(dtype), work.image, work.head
    return torch.no_grad()(lambda: head.kernels(x, image))


def _whole_head(work: Workload, dtype: str) -> Case:
    x, image, head = work.features(dtype), work.image, work.head
    return torch.no_grad()(lambda: head(x, image))


def _masks(work: Workload, dtype: str) -> Case:
    """A linear classifier on the features first, then its few maps through reassembly."""
    x, image, head = work.features(dtype), work.image, work.head
    classifier = torch.randn(CLASSES, work.setting.channels, 1, 1).to(x)

    def run() -> Tensor:
        return head.reassemble(head.kernels(x, image), F.conv2d(x, classifier))

    return torch.no_grad()(run)


def _gradient(value: bool, weights: bool) -> Callable[[Workload, str], Case]:
    def build(work: Workload, dtype: str) -> Case:
        x = work.features(dtype).detach().clone().requires_grad_(value)
        w = work.weights(dtype).detach().clone().requires_grad_(weights)
        out = reassemble(x, w)
        grad = torch.ones_like(out)
        wanted = [t for t in (x, w) if t.requires_grad]
        return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)

    return build


def _training_step(work: Workload, dtype: str) -> Case:
    """Forward and backward through the whole head, for its parameters and the features."""
    x = work.features(dtype).detach().clone().requires_grad_()
    image, head = work.image, work.head
    wanted = [x, *head.parameters()]

    def run() -> tuple[Tensor, ...]:
        out = head(x, image)
        return torch.autograd.grad(out, wanted, torch.ones_like(out))

    return run


def _literal(work: Workload, dtype: str) -> Case:
    x, image = work.features(dtype), work.image.to(DTYPES[dtype])
    evaluate = literal_head(work.head, work.device)
    return torch.no_grad()(lambda: evaluate(x, image))


_CASES: dict[str, Callable[[Workload, str], Case]] = {
    "backbone": _backbone,
    "copy": _copy,
    "bilinear": _bilinear,
    "joint bilateral": _joint_bilateral,
    "reassembly": _reassembly,
    "kernel weights": _kernel_weights,
    "whole head": _whole_head,
    "masks": _masks,
    "value gradient": _gradient(True, False),
    "weights gradient": _gradient(False, True),
    "both gradients": _gradient(True, True),
    "training step": _training_step,
    "literal": _literal,
}
FORWARD = ("copy", "bilinear", "reassembly", "kernel weights", "whole head", "masks")
BACKWARD = ("value gradient", "weights gradient", "both gradients", "training step")


def literal_head(head: ReSFU, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The definition in the tests, with the parameters of ``head``, in the dtype of its inputs."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from reference.resfu import resfu

    names = {"feature_norm": "norm_x", "guidance_norm": "norm_y", "query": "q", "key": "k"}
    pcdc = {
        "difference": "",
        "mix": "channel_compressor.1.",
        "mix_norm": "channel_compressor.3.",
        "score": "channel_compressor.4.",
        "norm": "norm.",
    }
    state = {}
    for name, tensor in head.state_dict().items():
        first, *rest = name.split(".")
        if first in names:
            state[".".join([names[first], *rest])] = tensor
        elif first.endswith("_scores"):
            renamed = f"{first}.{pcdc[rest[0]]}{rest[1]}"
            if renamed.endswith("_scores.bias"):
                tensor = tensor.reshape(1, -1, 1, 1)
            state[renamed] = tensor

    def evaluate(x: Tensor, image: Tensor) -> Tensor:
        parameters = {name: tensor.to(x) for name, tensor in state.items()}
        with torch.device(device):  # the definition makes its coordinates where it is told to
            return resfu(parameters, x, head.stem(image), head.config.groups)[0]

    return evaluate


def prepare(setting: Setting, name: str, backend: str) -> Case:
    """For :class:`measuring.Apart`: the case on the CPU."""
    set_backend(backend)
    return Workload(setting, torch.device("cpu")).case(name)


@contextmanager
def runners(
    setting: Setting, names: Iterable[str], device: torch.device
) -> Iterator[tuple[dict[str, Here | Apart], dict[str, str]]]:
    """What runs each case, in a process of its own on the CPU; and the cases that do not fit."""
    found: dict[str, Here | Apart] = {}
    skipped: dict[str, str] = {}
    work = None if device.type == "cpu" else Workload(setting, device)
    with ExitStack() as stack:
        for name in names:
            try:
                if work is None:
                    found[name] = stack.enter_context(Apart(prepare, setting, name, get_backend()))
                else:
                    found[name] = Here(work.case(name), device)
            except OutOfMemory as error:
                skipped[name] = str(error)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                skipped[name] = "out of memory"
        yield found, skipped
