"""What is said of a run before it starts: from small programs compiled here, and for TPUs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from convnext_jax import InputError
from convnext_jax.training import ahead
from convnext_jax.training.config import default_config

ROOT = Path(__file__).parents[2]
HAS_TPU_COMPILER = importlib.util.find_spec("libtpu") is not None


def toy_config(width: int = 16, **changes) -> ConfigDict:
    """Of 1,000 examples that are nowhere, and a network whose parameters can be counted by hand."""
    config = default_config()
    config.plan_examples, config.plan_classes = 1000, 10
    config.image_size = 8
    config.augment = ""
    config.model.patch_size = 2
    config.model.depths = (1,)
    config.model.hidden_sizes = (width,)
    config.batch_size, config.mix_group = 64, 8
    config.epochs, config.warmup_epochs = 4.0, 1.0
    config.update(changes)
    return config


# Stem with its norm; convolution, norm, two dense layers and layer scale; last norm; head.
TOY_PARAMETERS = (2 * 2 * 3 + 1 + 2) * 16 + (49 + 1 + 2 + 64 + 4 + 64 + 1 + 1) * 16 + 32 + 170


def lowered(**changes) -> ahead.Step:
    return ahead.lower(FrozenConfigDict(toy_config(**changes)), jax.devices()[:1], 1000, 10)


def in_process(program: str, devices: int = 8) -> str:
    """What a program prints that is run where JAX has so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def plan_rows(*flags: str, cwd: Path) -> dict[str, str]:
    """The table that train.py prints, by the names of its rows."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags],
        cwd=cwd, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return as_rows(done.stdout)


def as_rows(table: str) -> dict[str, str]:
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in table.splitlines())


# The program's text -------------------------------------------------------------------------------


def test_collectives_of_compiled_programs():
    program = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from convnext_jax.training import ahead

mesh = Mesh(np.array(jax.devices()), ("d",))
ring = [(i, (i + 1) % 8) for i in range(8)]
functions = {
    "pair": lambda x: sum(y.sum() for y in jax.lax.psum((x, x[:2].astype(jnp.bfloat16)), "d")),
    "gather": lambda x: jax.lax.all_gather(x, "d").sum(0),
    "scatter": lambda x: jax.lax.psum_scatter(x, "d", tiled=True),
    "exchange": lambda x: jax.lax.all_to_all(x, "d", 0, 0, tiled=True),
    "shift": lambda x: jax.lax.ppermute(x, "d", ring),
    "none": lambda x: x + 1,
}
for name, function in functions.items():
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("d"), out_specs=P(), check_vma=False)
    # Of a device: 8 x 5 numbers.
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 5), jnp.float32)).compile().as_text()
    print(name, ahead.collectives(text))
"""
    found = dict(line.split(" ", 1) for line in in_process(program).splitlines())
    found = {name: eval(said) for name, said in found.items()}
    # XLA's CPU backend may take half precision for single.
    assert found.pop("pair").get("all-reduce", (0, 0))[1] in (160 + 20, 160 + 40)
    assert found == {
        "gather": {"all-gather": (1, 8 * 160)},
        "scatter": {"reduce-scatter": (1, 160)},
        "exchange": {"all-to-all": (1, 160)},
        "shift": {"collective-permute": (1, 160)},
        "none": {},
    }


# As XLA writes it for accelerators: halves of operations, tuples, layouts, a part of the chip.
TEXT = """\
HloModule jit_f, is_scheduled=true

%fused (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0:T(1024)} parameter(0)
  ROOT %inner = f32[1024]{0:T(1024)} negate(%p)
}

ENTRY %main (a: f32[1024], b: bf16[8,128]) -> f32[1024] {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %b = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %gather-start = (f32[1024]{0:T(1024)}, f32[4096]{0:T(1024)}) all-gather-start(%a), channel_id=1, dimensions={0}
  %near = f32[1024]{0:T(1024)S(1)} fusion(%a), kind=kLoop, calls=%fused
  %gather-done = f32[4096]{0:T(1024)} all-gather-done(%gather-start)
  %shift-start = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%b), source_target_pairs={{0,1},{1,0}}
  %shift-done = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute-done(%shift-start)
  %sum = (f32[1024]{0:T(1024)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}) all-reduce(%near, %shift-done), to_apply=%add
  ROOT %out = f32[1024]{0:T(1024)} get-tuple-element(%sum), index=0
}
"""  # noqa: E501


def test_collectives_in_two_halves_and_of_tuples():
    assert ahead.collectives(TEXT) == {
        "all-gather": (1, 4 * 4096),
        "collective-permute": (1, 2 * 1024),
        "all-reduce": (1, 4 * 1024 + 2 * 1024),
    }


def test_an_exchange_that_goes_on_beside_several_operations_counts_once():
    line = next(line for line in TEXT.splitlines() if " all-gather-start(" in line)
    whole = "  %part.{} = f32[4096]{{0:T(1024)}} all-gather(%a), channel_id={}, dimensions={{0}}"
    again = "\n".join([line, whole.format(1, 1), whole.format(2, 1), whole.format(3, 7)])
    assert ahead.collectives(TEXT.replace(line, again))["all-gather"] == (2, 2 * 4 * 4096)


def test_traffic_leaves_out_what_stays_on_the_chip():
    read_for_fusion = 4 * 1024  # what it writes stays there, and so do its insides
    gather = 4 * 1024 + 4 * 4096
    shift = 2 * 1024 + 2 * 1024
    total = 2 * 1024 + (4 * 1024 + 2 * 1024)  # one of the two operands is on the chip
    assert ahead.traffic(TEXT) == read_for_fusion + gather + shift + total


def test_traffic_of_a_compiled_program():
    x = jax.ShapeDtypeStruct((1000, 10), np.float32)
    text = jax.jit(lambda x: jax.numpy.sin(x) + 1).lower(x).compile().as_text()
    assert ahead.traffic(text) == 2 * 40_000  # read and written once


# The step -----------------------------------------------------------------------------------------


def test_memory_of_a_step_by_what_holds_it():
    step = lowered()
    needs = ahead.memory(step, step.lowered.compile())
    assert needs["parameters"] == needs["EMA"] == 4 * TOY_PARAMETERS
    assert needs["gradients"] == 4 * TOY_PARAMETERS
    assert needs["optimizer"] == 2 * 4 * TOY_PARAMETERS + 4  # two moments and a count
    assert needs["pictures"] == 64 * (8 * 8 * 3 + 4)
    # The blocks' maps of four times the width, at least, in single precision.
    assert 64 * 4 * 4 * 64 * 4 < needs["activations"] < 64 * 4 * 4 * 64 * 4 * 20
    assert 0 <= needs["padding, program"] < 10_000


def test_a_run_without_average_holds_none():
    assert ahead._held(lowered(ema_decay=0.0))["EMA"] == 0


def test_nothing_is_made_of_a_network_too_large_to_be_here():
    config = toy_config(width=2**17)  # 550 GB of parameters
    step = ahead.lower(FrozenConfigDict(config), jax.devices()[:1], 1000, 10)
    assert ahead._held(step)["parameters"] > 5e11


def test_a_checkpoint_is_not_read_where_the_network_is_described():
    step = lowered(init_from="nowhere", layer_decay=0.8, layer_decay_rule="single")
    assert ahead._held(step)["parameters"] == 4 * TOY_PARAMETERS


def test_settings_are_checked():
    with pytest.raises(InputError, match="batch_size is 2048 and there are 1000"):
        lowered(batch_size=2048)
    with pytest.raises(InputError, match="flip is 2"):
        lowered(flip=2.0)


def test_sharded_state_is_a_part_of_it_on_each_device():
    program = """
import jax
from ml_collections import FrozenConfigDict
from convnext_jax.training import ahead
from tests.training.test_ahead import toy_config

for parallelism in ("pmap", "sharded"):
    config = toy_config(width=128, parallelism=parallelism)
    step = ahead.lower(FrozenConfigDict(config), jax.devices(), 1000, 10)
    compiled = step.lowered.compile()
    needs = ahead.memory(step, compiled)
    print(needs["parameters"], needs["optimizer"], needs["pictures"],
          *sorted(ahead.collectives(compiled.as_text())))
"""
    pmap, sharded = (line.split() for line in in_process(program).splitlines())
    assert pmap[3:] == ["all-reduce"]
    assert sharded[3:] == ["all-gather", "all-reduce", "reduce-scatter"]
    assert pmap[2] == sharded[2] == str(8 * (8 * 8 * 3 + 4))
    # The two dense kernels are split over eight devices; the rest is small, and whole.
    dense = 2 * 4 * 128 * 512
    assert int(pmap[0]) - int(sharded[0]) == dense - dense // 8
    assert int(pmap[1]) - int(sharded[1]) == 2 * (dense - dense // 8)


# The table ----------------------------------------------------------------------------------------


def test_what_is_printed_of_the_devices_at_hand(tmp_path):
    rows = plan_rows("--plan", "--config.model.depths=(1,1,1)", cwd=tmp_path)
    assert rows["data"] == "1,438 to train on, 10 classes"
    assert rows["steps"] == "1,760 in 40 epochs"
    parameters = int(rows["network"].split(" ")[0].replace(",", ""))
    assert rows["parameters"] == ahead._size(4 * parameters)
    assert rows["fits"] == "unknown, as the memory of this device is"
    counted, products = map(float, re.findall(r"([\d.]+) (?:GFLOP|for)", rows["arithmetic"]))
    assert products < counted < 2 * products
    assert list(tmp_path.iterdir()) == []  # no run was started


@pytest.fixture
def an_accelerator(monkeypatch):
    """Stands for a device that is known: the one at hand does 1 TFLOP/s and 10 GB/s."""
    kind = jax.devices()[0].device_kind

    def install(memory: float) -> None:
        monkeypatch.setitem(ahead.CHIPS, kind, ahead.Chip(1e12, 1e10, memory))

    return install


def rows_of(config: ConfigDict, capsys) -> dict[str, str]:
    ahead.print_forecast(config)
    return as_rows(capsys.readouterr().out)


def test_time_is_of_what_takes_longer(an_accelerator, capsys):
    an_accelerator(1e9)
    rows = rows_of(toy_config(batch_size=64 * jax.device_count()), capsys)
    assert rows["fits"] == "yes: there are 1.00 GB"
    computing, moving, step = (
        float(rows[name].split(" ")[0]) for name in ("computing", "moving", "step")
    )
    traffic = float(rows["traffic"].split(" ")[0])
    assert moving == pytest.approx(1e3 * traffic * 1e6 / 1e10, rel=0.02)
    assert step == max(computing, moving)
    hours = float(rows["run"].split(" ")[0])
    steps = int(rows["steps"].split(" ")[0])
    assert hours == pytest.approx(steps * step / 1e3 / 3600, rel=0.02)


def test_what_does_not_fit_is_said(an_accelerator, capsys):
    an_accelerator(1e5)
    rows = rows_of(toy_config(batch_size=64 * jax.device_count()), capsys)
    assert rows["fits"] == "no: there are 0.1 MB"


def test_accumulated_parts_count_each(capsys):
    config = toy_config(width=128, batch_size=64 * jax.device_count())
    whole = rows_of(config, capsys)
    config.gradient_accumulation = 4
    parts = rows_of(config, capsys)
    assert parts["batch"].endswith("x 64 in 4 parts")
    flops = [float(rows["arithmetic"].split(" ")[0]) for rows in (whole, parts)]
    # What is outside the parts counts four times.
    assert flops[1] == pytest.approx(flops[0], rel=0.3)


def test_data_that_is_not_there_needs_its_numbers(tmp_path):
    config = toy_config(plan_examples=0)
    with config.unlocked():
        config.data = ConfigDict({"name": "image_folder", "folder": str(tmp_path / "none")})
    with pytest.raises(InputError, match=r"none.*give --config.plan_examples and"):
        ahead.print_forecast(config)


# Described devices --------------------------------------------------------------------------------


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^the compiler for v5e:4x4 .* pip install libtpu"):
        ahead.describe("v5e:4x4")


needs_tpu_compiler = pytest.mark.skipif(
    not HAS_TPU_COMPILER, reason="libtpu, which compiles for TPUs, is not installed"
)


@needs_tpu_compiler
def test_topologies_that_there_are_not():
    program = """
from convnext_jax import InputError
from convnext_jax.training import ahead

for topology in ("v5e", "v5e:3x5", "v9:2x2", "nonsense"):
    try:
        ahead.describe(topology)
    except InputError as error:
        print(error)
"""
    said = in_process(program).splitlines()
    assert len(said) == 4
    for line in said:
        assert re.fullmatch(r"there is no topology '.*' \(.+\): give one such as v5e:4x4, .*", line)


@needs_tpu_compiler
@pytest.mark.parametrize("parallelism", ["pmap", "sharded"])
def test_a_step_compiled_for_tpus_has_their_convolution(parallelism):
    program = f"""
from ml_collections import FrozenConfigDict
from convnext_jax.training import ahead
from tests.training.test_ahead import toy_config

devices = ahead.describe("v5e:4x4")
config = toy_config(batch_size=256, parallelism={parallelism!r}, dtype="bfloat16")
compiled = ahead.lower(FrozenConfigDict(config), devices, 1000, 10).lowered.compile()
print(compiled.as_text())
"""
    text = in_process(program, devices=1)
    assert "feature_group_count=16" in text  # the plain form, neither the CPU's nor CUDA's
    targets = set(re.findall(r'custom_call_target="([^"]*)"', text))
    assert not [t for t in targets if re.search(r"cu(dnn|blas|da)|triton|gpu|cpu", t, re.I)]
    assert set(ahead.collectives(text)) == {"all-reduce"}  # none of the parameters is large


@needs_tpu_compiler
def test_what_is_printed_of_a_described_slice(tmp_path):
    rows = plan_rows(
        "--plan", "v5e:2x2", "--config.model.depths=(1,1,1)", "--config.mix_group=8", cwd=tmp_path
    )
    assert rows["devices"] == "4 x TPU v5 lite, v5e:2x2 as described, pmap"
    assert rows["fits"] == "yes: there are 16.00 GB"
    assert rows["all-reduce"].startswith("1, of ")
    assert rows["moving"].endswith("819 GB/s")


@needs_tpu_compiler
def test_what_the_compiler_finds_too_large_is_said_with_what_is_known(tmp_path):
    rows = plan_rows(
        "--plan=v5e:2x2", "--config.model.depths=(1,)", "--config.model.hidden_sizes=(16384,)",
        "--config.mix_group=8", cwd=tmp_path,
    )  # fmt: skip
    assert rows["parameters"].endswith(" GB")
    assert rows["fits"].startswith("no: RESOURCE_EXHAUSTED")
