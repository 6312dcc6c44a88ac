"""``fmupsample probe``: linear segmentation and depth on frozen features."""

from __future__ import annotations

import typer

from fmupsample_cli.probe_eval import evaluate
from fmupsample_cli.probe_fit import fit
from fmupsample_cli.probe_predict import predict

probe = typer.Typer(
    help="Fit, judge and use a linear probe on frozen, upsampled features: segmentation or depth.\n"
    "\n"
    "    fmupsample probe fit images/ labels/ -o probe.safetensors\n"
    "\n"
    "    fmupsample probe eval probe.safetensors val/images/ val/labels/\n"
    "\n"
    "    fmupsample probe predict probe.safetensors photos/ -o masks/\n",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
probe.command(name="fit")(fit)
probe.command(name="eval")(evaluate)
probe.command(name="predict")(predict)
