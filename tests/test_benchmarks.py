"""The benchmarks' instruments: what they record, compare and draw. No times are judged here."""

from __future__ import annotations

import json
import subprocess
import sys

import allocating
import pytest
import torch
from PIL import Image

import bars
import beside_load
import errors
import reports
import throughput
import upsampling
from cases import Setting
from fmupsample.bench.measuring import Apart, Here, OutOfMemory, summary, time_cases
from fmupsample.errors import UsageError
from peers import neighbourhood_attention

CPU = torch.device("cpu")


def test_a_small_run_writes_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(errors, "SETTING", Setting(size=28, channels=32))
    out = tmp_path / "numbers.json"
    options = ["--quick", "--device", "cpu", "--size", "28", "--rounds", "2", "--no-memory"]
    upsampling.main([*options, "--channels", "192", "-o", str(out)])
    report = json.loads(out.read_text())
    assert {"cpu", "torch", "threads", "commit"} <= report["machine"].keys()
    (result,) = report["results"]
    assert result["setting"] == {"size": 28, "channels": 192, "ratio": 14, "batch": 1}
    assert result["output_bytes"] == {"fp32": 4 * 192 * 28**2, "bf16": 2 * 192 * 28**2}
    read_once = 4 * (192 * 2 * 2 + 9 * 28**2)
    assert result["moved_bytes"]["fp32"] == read_once + 4 * 192 * 28**2
    names = {"whole head fp32", "both gradients bf16", "training step fp32", "literal fp32"}
    assert names | {"copy bf16", "bilinear fp32", "backbone bf16"} <= result["cases"].keys()
    for case in result["cases"].values():
        low, high = case["quartiles_s"]
        assert 0 < low <= case["median_s"] <= high
    assert result["errors"]["fp32"]["whole head"]["ours"] < 1e-4
    assert {row["verdict"] for row in report["bars"]} == {"not measured"}  # no bar is about 28 px
    assert "whole head fp32" in capsys.readouterr().out

    # A sweep leaves what a thorough run has measured alone.
    upsampling.main([*options[1:], "--channels", "192", "-o", str(out), "--sweep", "size=28"])
    assert json.loads(out.read_text())["results"] == [result]


def test_throughput_of_whole_runs(tmp_path, pictures, capsys):
    for name in ("more.png", "again.png"):
        (pictures / name).write_bytes((pictures / "square.png").read_bytes())
    out, drawn = tmp_path / "numbers.json", tmp_path / "drawn"
    small = ["--image-size", "56", "--upsampler", "jbu", "--device", "cpu", "--rounds", "2"]
    throughput.main([str(pictures), *small, "--folder", str(tmp_path), "-o", str(out)])
    (result,) = json.loads(out.read_text())["results"]
    assert result["setting"]["pictures"] == 5 and result["setting"]["rounds"] == 2
    assert list(result["kinds"]) == ["tokens", "compact", "pca"]
    for row in result["kinds"].values():
        added = row["overhead_percent"]
        assert row["models"]["median_s"] > 0 and row["models"]["rounds"] == 2
        assert -100 < added["least"] <= added["median"] <= added["most"]
        waits = [row["waiting_percent"][what]["median"] for what in ("decode", "write")]
        assert all(wait > 0 for wait in waits) and sum(waits) < 100
    assert "pca: added by the pipeline" in capsys.readouterr().out
    assert not list(tmp_path.glob("tmp*"))  # what the runs wrote is gone
    sources = throughput.draw(drawn, 4, (96, 128))
    sizes = [Image.open(source.path).size for source in sources]
    assert sizes == [(128, 96)] * 3 + [(96, 128)]


def test_interleaved_rounds_count_every_case():
    calls = {"a": 0, "b": 0}

    def case(name):
        def run():
            calls[name] += 1

        return run

    rows, skipped = time_cases({name: Here(case(name), CPU) for name in calls}, 4)
    assert [row["rounds"] for row in rows.values()] == [4, 4]
    assert calls == {"a": 8, "b": 8}  # each after one that is not timed
    assert not skipped
    assert summary([3.0, 1.0, 2.0])["median_s"] == 2.0


def test_a_case_without_memory_is_left_out():
    def hungry():
        raise torch.OutOfMemoryError("out of memory")

    cases = {"hungry": Here(hungry, CPU), "fine": Here(lambda: None, CPU)}
    rows, skipped = time_cases(cases, 2)
    assert (list(rows), skipped) == (["fine"], {"hungry": "out of memory"})


def test_peak_memory_of_a_larger_call_is_larger():
    with Apart(allocating.allocation, 40) as small, Apart(allocating.allocation, 120) as large:
        rows, _ = time_cases({"small": small, "large": large}, 1, peaks=lambda name: True)
    peak = {name: row["peak_bytes"] for name, row in rows.items()}
    assert 40 << 20 <= peak["small"] < 50 << 20
    assert 120 << 20 <= peak["large"] < 130 << 20


def test_errors_in_a_process_apart_are_told():
    with pytest.raises(ZeroDivisionError):
        Apart(allocating.broken)
    with Apart(allocating.ending) as ending, pytest.raises(OutOfMemory, match="was ended"):
        ending.seconds()


def result_of(device: str, batch: int, **cases: float) -> dict:
    return {
        "setting": {"size": 448, "channels": 384, "ratio": 14, "batch": batch},
        "device": device,
        "backend": "torch",
        "output_bytes": {"fp32": 300e6, "bf16": 150e6},
        "moved_bytes": {"fp32": 320e6, "bf16": 160e6},
        "cases": {name.replace("_", " "): {"median_s": value} for name, value in cases.items()},
    }


def verdicts(*results: dict) -> dict[tuple[str, str], str]:
    return {(row["device"], row["bar"]): row["verdict"] for row in bars.evaluate([*results])}


def test_bars_on_the_cpu():
    result = result_of("cpu", 1, reassembly_fp32=2.0, bilinear_fp32=1.0, backbone_fp32=4.0)
    result["cases"]["whole head fp32"] = {"median_s": 5.0, "peak_bytes": 450e6}
    result["cases"]["whole head bf16"] = {"median_s": 3.5}
    result["error_ratio"] = {"fp32": 1.9}
    found = verdicts(result)
    assert found["cpu", "reassembly fp32 / bilinear fp32"] == "MISS"
    assert found["cpu", "whole head fp32 / backbone fp32"] == "PASS"
    assert found["cpu", "whole head bf16 / backbone fp32"] == "MISS"
    assert found["cpu", "masks fp32 / backbone fp32"] == "not measured"
    assert found["cpu", "whole head fp32: peak - output"] == "PASS"
    assert found["cpu", "error fp32 / that of plain PyTorch"] == "PASS"
    assert found["cpu", "error bf16 / that of plain PyTorch"] == "not measured"
    assert {v for (device, _), v in found.items() if device == "cuda"} == {"not measured"}


def test_bars_on_a_gpu():
    # 600 MB in 0.2 ms is a copy rate of 3 TB/s; 320 MB at 70 % of it take 0.152 ms.
    kept = result_of("cuda", 8, copy_fp32=0.2e-3, reassembly_fp32=0.150e-3, masks_bf16=3e-3)
    name = ("cuda", "reassembly fp32 / copy rate")
    assert verdicts(kept)[name] == "PASS"
    assert verdicts(kept)["cuda", "masks bf16, a picture"] == "PASS"  # 0.375 ms
    missed = result_of("cuda", 8, copy_fp32=0.2e-3, reassembly_fp32=0.155e-3)
    assert verdicts(missed)[name] == "MISS"
    assert verdicts(result_of("cuda", 1, copy_fp32=1.0, reassembly_fp32=1.0))[name] == (
        "not measured"
    )
    assert "MISS" in bars.table(bars.evaluate([missed]))


def test_growth_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    import plots

    machine = {"cpu": "a CPU", "threads": 2, "torch": "2.0", "gpu": None}

    def result(**changes: int) -> dict:
        made = result_of("cpu", 1)
        made["setting"] |= changes
        work = made["setting"]["size"] ** 2 * made["setting"]["channels"] / 1e9
        made["cases"] = {
            f"{name} fp32": {"median_s": factor * work}
            for factor, name in enumerate(("reassembly", "bilinear", "whole head"), 1)
        }
        return made

    alone = [result()]
    assert plots.growth(alone, "fp32", machine) is None
    results = [*alone, result(size=224), result(size=896), result(channels=768)]
    figure = plots.growth(results, "fp32", machine)
    figure.savefig(tmp_path / "growth.png")
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.format == "PNG" and picture.width > 800
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) == {"ReSFU, whole", "its reassembly", "F.interpolate"}  # what was measured
    assert list(lines["its reassembly"].get_xdata()) == [224**2, 448**2, 896**2]


def test_results_of_another_machine_are_replaced(tmp_path, monkeypatch):
    path, one = tmp_path / "numbers.json", {"cpu": "one", "commit": "a", "load": 0.1}

    def report(machine: dict) -> reports.Report:
        monkeypatch.setattr(reports, "describe", lambda device: machine)
        return reports.Report(path, CPU)

    first = report(one)
    first.add({"size": 1}, cases={"a": 1})
    first.write()
    again = report(one | {"commit": "b", "load": 3.0})
    assert again.results == first.results
    again.add({"size": 2}, cases={})
    again.add({"size": 1}, cases={"a": 2})
    assert [(r["setting"]["size"], r["cases"]) for r in again.results] == [(1, {"a": 2}), (2, {})]
    assert report(one | {"cpu": "another"}).results == []


def test_a_command_alone_and_beside_busy_loops(tmp_path, capfd):
    out = tmp_path / "beside.json"
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir()"  # a new folder each time
    options = ["-o", str(out), "--rounds", "2", "--loops", "3", "--"]
    beside_load.main([*options, sys.executable, "-S", "-c", code, "{out}"])
    (result,) = json.loads(out.read_text())["results"]
    rows = result["cases"]
    assert list(rows) == ["alone", "beside"] and {row["rounds"] for row in rows.values()} == {2}
    assert result["ratio"] == rows["beside"]["median_s"] / rows["alone"]["median_s"]
    assert result["setting"]["loops"] == 3 and result["fair"] == 1 + 3 / result["setting"]["cores"]
    assert "by a fair share" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([sys.executable, "-S", "-c", "raise SystemExit('no pictures')"], "code 1: no pictures"),
        (["/no/such/program"], "cannot be started"),
        (["--loops", "0", "true"], "1 or more"),
    ],
)
def test_a_command_that_fails_is_one_sentence(command, said):
    with pytest.raises(UsageError, match=said):
        beside_load.main(["--rounds", "1", *(["--"] if command[0][0] != "-" else []), *command])


def test_busy_loops_end_with_the_command(monkeypatch):
    started = []

    class Kept(subprocess.Popen):
        def __init__(self, command, **more):
            super().__init__(command, **more)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Kept)
    with pytest.raises(UsageError):
        beside_load.seconds(["/no/such/program"], 2)
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_sizes_are_whole_cells():
    assert Setting(size=2048, ratio=14).size == 2044
    assert Setting(size=448, ratio=16).cells == 28


@pytest.mark.parametrize("cells", [(4, 5), (2, 3)])
def test_stand_in_for_neighbourhood_attention(cells):
    """Pixel by pixel: the window of its residue class, moved inside at the borders."""
    (rows, columns), (dy, dx), kernel = cells, (2, 3), 3
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, rows * dy, columns * dx, 2, d, generator=generator, dtype=torch.float64)
        for d in (4, 4, 6)
    )
    out = neighbourhood_attention(q, k, v, (kernel, kernel), (dy, dx))
    for y in range(rows * dy):
        for x in range(columns * dx):
            top = min(max(y // dy - 1, 0), max(rows - kernel, 0))
            left = min(max(x // dx - 1, 0), max(columns - kernel, 0))
            ys = [i * dy + y % dy for i in range(top, min(top + kernel, rows))]
            xs = [j * dx + x % dx for j in range(left, min(left + kernel, columns))]
            keys = k[0][ys][:, xs].flatten(0, 1)  # [neighbours, heads, 4]
            values = v[0][ys][:, xs].flatten(0, 1)
            weights = (torch.einsum("hd,nhd->nh", q[0, y, x], keys) / 2).softmax(0)
            expected = torch.einsum("nh,nhd->hd", weights, values)
            torch.testing.assert_close(out[0, y, x], expected)
