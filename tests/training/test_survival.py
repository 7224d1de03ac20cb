"""Runs as they are started, stopped and continued: on other devices, after kills, on a full disk.

`train.py` takes this file for its configuration: a toy network, with all the randomness of a run.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from convnext_jax.training.config import default_config
from convnext_jax.training.metrics import read_rows

TRAIN = Path(__file__).parents[2] / "train.py"
STEPS = 50

pytestmark = pytest.mark.slow


def get_config() -> ConfigDict:
    config = default_config()
    config.data = ConfigDict({"name": "digits", "val_fraction": 0.2, "split_seed": 0})
    config.image_size = 8
    config.crop_pct = 1.0
    config.mix_group = 8
    config.model.patch_size = 2
    config.model.depths = (1, 1)
    config.model.hidden_sizes = (32, 64)  # so that some parameters are large enough to be sharded
    config.model.drop_path_rate = 0.3
    config.model.layer_scale_init_value = 1.0
    config.batch_size = 64
    config.epochs = STEPS / 22
    config.warmup_epochs = 0.5
    config.ema_decay = 0.9
    config.checkpoint_every_epochs = 3.5 / 22
    config.log_every_steps = 1
    config.log_example_ids = True
    config.loader_workers = 1
    return config


def start(
    workdir: Path, *flags: str, devices: int = 8, layout: str = "pmap", cache: Path | None = None
) -> subprocess.Popen:
    """A run as a process of its own; what it says goes to a file beside its folder."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # Without one, two processes that compile at unequal speed would wait for each other too
        # long: of several, only the first writes into it.
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_ENABLE_COMPILATION_CACHE": "0" if cache is None else "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONFAULTHANDLER": "1",  # see `ended`
    }
    command = [sys.executable, str(TRAIN), f"--config={__file__}", f"--workdir={workdir}"]
    command += [f"--config.parallelism={layout}", *flags]
    with log_of(workdir).open("ab") as log:  # through a pipe, which has no limit of its size
        pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
    with pipe.stdin as end:
        return subprocess.Popen(command, env=environment, stdout=end, stderr=end)


def start_two(
    workdir: Path, *flags: str, layout: str = "pmap", of_second: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """A run of two processes with four devices each; the second may have flags of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = (*flags, f"--coordinator=127.0.0.1:{port}", "--processes=2")
    first = start(workdir, *flags, "--process=0", layout=layout, devices=4)
    return [first, start(workdir, *flags, "--process=1", *of_second, layout=layout, devices=4)]


def log_of(workdir: Path) -> Path:
    return workdir.with_name(workdir.name + ".log")


def ended(process: subprocess.Popen) -> int:
    """Its status; one that hangs is made to say in its log where each of its threads is."""
    try:
        return process.wait(240)  # processes give up waiting for each other after 300
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        return process.wait(60)


def ends_well(process: subprocess.Popen, workdir: Path) -> None:
    assert process.wait(600) == 0, log_of(workdir).read_text()[-3000:]


def until(process: subprocess.Popen, holds) -> bool:
    """Waits for something that a run is to do before it ends; whether it did."""
    for _ in range(60_000):
        has_ended = process.poll() is not None
        if holds():
            return True
        if has_ended:
            time.sleep(1)  # for what it said last
            return holds()
        time.sleep(0.01)
    raise AssertionError("the run did not come to it")


def steps_of(workdir: Path) -> int:
    """The last step that a run has started, of this start or an earlier one."""
    rows = read_rows(workdir / "examples.jsonl")
    return rows[-1]["step"] if rows else 0


def last_state(workdir: Path) -> dict:
    """The last checkpoint's arrays, whatever devices it was written on."""
    folder = workdir / "checkpoints" / str(STEPS) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))


def assert_equal_runs(workdir: Path, other: Path) -> None:
    """Every bit of the weights, of their average, of the optimizer and of the figures."""
    for name in ("metrics.jsonl", "examples.jsonl"):
        assert (workdir / name).read_bytes() == (other / name).read_bytes(), name
    theirs = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(last_state(other))}
    ours = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(last_state(workdir))}
    assert ours.keys() == theirs.keys()
    assert any("average" in name for name in ours)
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """Folders of runs that nothing happened to, on 8 devices, by layout."""
    root = tmp_path_factory.mktemp("whole")
    for layout in ("pmap", "sharded"):
        ends_well(start(root / layout, layout=layout, cache=cache), root / layout)
    return {layout: root / layout for layout in ("pmap", "sharded")}


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """Folders of runs of two processes that nothing happened to, by layout."""
    root = tmp_path_factory.mktemp("whole_of_two")
    for layout in ("pmap", "sharded"):
        for process in start_two(root / layout, layout=layout):
            ends_well(process, root / layout)
    return {layout: root / layout for layout in ("pmap", "sharded")}


def test_curve_is_the_same_on_any_devices(whole, whole_of_two, tmp_path, cache):
    folders = dict(whole)
    for layout in ("pmap", "sharded"):
        for devices in (1, 2):
            workdir = folders[f"{layout} {devices}"] = tmp_path / f"{layout}_{devices}"
            ends_well(start(workdir, layout=layout, devices=devices, cache=cache), workdir)
        folders[f"{layout} 2 x 4"] = whole_of_two[layout]
    curves = {
        name: np.array([row["train/loss"] for row in read_rows(workdir / "metrics.jsonl")
                        if "train/loss" in row])
        for name, workdir in folders.items()
    }  # fmt: skip
    one = curves["pmap 1"]
    assert len(set(one.tolist())) == STEPS
    for name, curve in curves.items():
        print(f"{name:>14}: largest relative difference {np.abs(curve / one - 1).max():.1e}")
        np.testing.assert_allclose(curve, one, rtol=1e-5, err_msg=name)
    finals = [json.loads((w / "metrics.json").read_text()) for w in folders.values()]
    for final in finals:
        assert final["val/top1"] == finals[0]["val/top1"]
        assert final["val_ema/loss"] == pytest.approx(finals[0]["val_ema/loss"], rel=1e-5)


def test_killed_twenty_times(whole, tmp_path, cache):
    """Before the last step; a run that comes to it ends, and another one is begun."""
    rng = random.Random(0)
    runs, kills, during_saves = [tmp_path / "run_0"], 0, 0
    while kills < 20:
        workdir = runs[-1]
        process = start(workdir, cache=cache)
        if kills % 4 == 3:  # in the middle of a save
            until(process, lambda: is_saving(workdir))  # noqa: B023
        else:
            until(process, grows(workdir / "examples.jsonl"))  # with the first step of this start
            time.sleep(rng.uniform(0, 4))
        if steps_of(workdir) == STEPS:
            ends_well(process, workdir)
            runs.append(tmp_path / f"run_{len(runs)}")
            continue
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kills += 1
        during_saves += is_saving(workdir)
    ends_well(start(runs[-1], cache=cache), runs[-1])
    assert during_saves > 0
    for workdir in runs:
        assert_equal_runs(workdir, whole["pmap"])
    said = "".join(log_of(workdir).read_text() for workdir in runs)
    resumed = re.findall(r"resumed from step (\d+)", said)
    print(f"{kills} kills of {len(runs)} runs, {during_saves} during a save; resumed from", resumed)
    assert len(set(resumed)) >= 2


def grows(path: Path):
    """Whether a file has become longer since it was asked before; a start may shorten it first."""
    sizes = [0]

    def has_grown() -> bool:
        sizes.append(path.stat().st_size if path.exists() else 0)
        return len(sizes) > 2 and sizes[-1] > sizes[-2]

    return has_grown


def is_saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize("layout", ["pmap", "sharded"])
def test_sigterm_saves_and_asks_to_be_started_again(layout, whole, tmp_path, cache):
    workdir = tmp_path / "run"
    process = start(workdir, layout=layout, cache=cache)
    assert until(process, lambda: steps_of(workdir) >= 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == os.EX_TEMPFAIL
    said = log_of(workdir).read_text()
    assert "train.py: asked to end, saved step" in said
    assert "Traceback" not in said
    ends_well(start(workdir, layout=layout, cache=cache), workdir)
    assert "resumed from step" in log_of(workdir).read_text()
    assert_equal_runs(workdir, whole[layout])


@pytest.mark.parametrize(
    ("before", "after", "devices"), [("sharded", "pmap", 1), ("pmap", "sharded", 8)]
)
def test_checkpoint_goes_to_another_layout(before, after, devices, whole, tmp_path, cache):
    """The evaluation of the last state is made anew, on other devices, and says the same."""
    workdir = tmp_path / "run"
    shutil.copytree(whole[before], workdir)
    (workdir / "metrics.json").unlink()
    ends_well(start(workdir, layout=after, devices=devices, cache=cache), workdir)
    assert f"resumed from step {STEPS}" in log_of(workdir).read_text()
    ours, theirs = (
        json.loads((folder / "metrics.json").read_text()) for folder in (workdir, whole[before])
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():  # the losses' sums have another order
        assert ours[name] == (pytest.approx(value, rel=1e-6) if "loss" in name else value), name


@pytest.mark.parametrize("failed_save", ["stop", "continue"])
def test_disk_that_is_full(failed_save, whole, tmp_path, cache):
    """The real writer fails, since no file may grow beyond a limit for a while."""
    workdir = tmp_path / "run"
    process = start(workdir, f"--config.failed_save={failed_save}", cache=cache)
    checkpoints = workdir / "checkpoints"
    until(
        process, lambda: checkpoints.exists() and any(p.name == "3" for p in checkpoints.iterdir())
    )
    unlimited = resource.RLIM_INFINITY
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, unlimited))
    assert until(process, lambda: "could not be written" in log_of(workdir).read_text())
    if process.poll() is None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
    status = ended(process)
    said = log_of(workdir).read_text()
    assert "File too large" in said
    if failed_save == "continue":
        assert status == 0
        assert "goes on without it" in said
    else:
        assert status == 2
        assert "Make room" in said
        ends_well(start(workdir, cache=cache), workdir)
        assert "resumed from step" in log_of(workdir).read_text()
    assert_equal_runs(workdir, whole["pmap"])


@pytest.mark.parametrize(
    ("failed_save", "layout", "number"), [("stop", "pmap", 0), ("continue", "sharded", 1)]
)
def test_disk_that_is_full_for_one_of_two(failed_save, layout, number, whole_of_two, tmp_path):
    """The other one, which could write its part, does not wait for it, and they do the same."""
    workdir = tmp_path / "run"
    both = start_two(workdir, f"--config.failed_save={failed_save}", layout=layout)
    assert until(both[0], lambda: (workdir / "checkpoints" / "3").exists())
    unlimited = resource.RLIM_INFINITY
    resource.prlimit(both[number].pid, resource.RLIMIT_FSIZE, (30_000, unlimited))
    assert until(both[number], lambda: "File too large" in log_of(workdir).read_text())
    if both[number].poll() is None:
        resource.prlimit(both[number].pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
    statuses = [ended(process) for process in both]
    assert until(both[0], lambda: "another process could not write" in log_of(workdir).read_text())
    said = log_of(workdir).read_text()
    if failed_save == "continue":
        assert statuses == [0, 0], said[-3000:]
        # The next one may have failed too, before there was room again.
        assert said.count("goes on without it") in (2, 4)
    else:
        assert statuses == [2, 2], said[-3000:]
        for process in start_two(workdir, layout=layout):
            ends_well(process, workdir)
        assert "resumed from step" in log_of(workdir).read_text()
    assert_equal_runs(workdir, whole_of_two[layout])


def test_notice_for_one_of_two_also_before_its_first_step(whole_of_two, tmp_path):
    workdir = tmp_path / "run"
    for start_number in range(2):
        both = start_two(workdir)
        if start_number == 0:
            assert until(both[0], lambda: steps_of(workdir) >= 10)
        else:
            assert until(both[0], lambda: "resumed from" in log_of(workdir).read_text())
        both[1].send_signal(signal.SIGTERM)
        statuses = [ended(process) for process in both]
        said = log_of(workdir).read_text()
        assert statuses == [os.EX_TEMPFAIL] * 2, said[-20000:]
        assert "Traceback" not in said
    saved = [int(step) for step in re.findall(r"asked to end, saved step (\d+)", said)]
    assert saved[0] == saved[1] < saved[2] == saved[3] < saved[0] + 5
    for process in start_two(workdir):
        ends_well(process, workdir)
    assert_equal_runs(workdir, whole_of_two["pmap"])


def test_one_of_two_is_killed_and_its_part_of_the_checkpoint_damaged(whole_of_two, tmp_path):
    workdir = tmp_path / "run"
    both = start_two(workdir, layout="sharded")
    assert until(both[0], lambda: steps_of(workdir) >= 12)
    both[1].kill()
    assert ended(both[0]) != 0  # by itself, as the other one is gone
    saved = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    for part in (workdir / "checkpoints" / str(saved[-1]) / "state").glob("ocdbt.process_1/d/*"):
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    for process in start_two(workdir, layout="sharded"):
        ends_well(process, workdir)
    said = log_of(workdir).read_text()
    assert f"checkpoint {saved[-1]} in" in said
    assert f"resumed from step {saved[-2]}" in said
    assert_equal_runs(workdir, whole_of_two["sharded"])


def test_one_of_two_cannot_begin(tmp_path):
    workdir = tmp_path / "run"
    first, second = start_two(workdir, of_second=("--config.batch_size=63",))
    assert ended(second) == 2
    assert ended(first) != 0
    assert "batch_size" in log_of(workdir).read_text()
