"""Two processes as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from small_training import assert_same, draw_pictures, options, run
from torch import distributed

CODE = """
    import os, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import torch
    from small_training import options, run
    from fmupsample.training import loop
    finish = loop.Trainer.run

    def keep(self):
        finish(self)
        torch.save(self.head.state_dict(), sys.argv[2] + f".rank{{self.world.rank}}.pt")

    loop.Trainer.run = keep
    if {slim}:
        make = loop.Trainer._accumulate

        def narrow(self, samples, step):
            if self.world.rank == 1 and self.parts == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return make(self, samples, step)

        loop.Trainer._accumulate = narrow
    report = run(Path(sys.argv[1]), Path(sys.argv[2]))
    print(report.leads)
"""


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("slim", [False, True], ids=["equal", "one short of memory"])
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path, slim: bool) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    run(pictures, one, options(batch_size=4))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = textwrap.dedent(CODE).format(tests=str(Path(__file__).parent), slim=slim)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(pictures), str(two)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    for process, leads in zip(processes, ("True", "False"), strict=True):
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert stdout.split()[-1] == leads
    ends = [torch.load(f"{two}.rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert_same(one, two, 1e-5)
    records = (tmp_path / "two.safetensors.train/log.jsonl").read_text().splitlines()
    assert [json.loads(r)["step"] for r in records if "loss" in json.loads(r)][-1] == 8


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_torchrun(tmp_path: Path, backbone_file) -> None:
    """The command as users type it, with a backbone file of the embedded format."""
    pictures = draw_pictures(tmp_path / "pictures", 5, side=96)
    output = tmp_path / "head.safetensors"
    config = {"upsampler_config": options().upsampler_config, "side": 96, "previews": 0}
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "fmupsample", "train", pictures, "-o", output, "--steps", "2", "--image-size", "64",
         "--backbone-weights", backbone_file("b.safetensors"), "--device", "cpu", "--json",
         "--upsampler", "resfu", "--config", json.dumps(config)],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 2
    assert output.exists()
