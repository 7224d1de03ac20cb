"""Every file under configs/ and every row of it: what it says, what it builds, and its first steps.

The published rows are written down here a second time, from the authors' commands (`TRAINING.md` of
facebookresearch/ConvNeXt and of facebookresearch/ConvNeXt-V2, tables 5 and 6 of
arXiv:2201.03545v2): nothing below is taken from the files that it checks.
"""

import functools
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image

from convnext_jax import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    InputError,
)
from convnext_jax.configuration import multiply_adds
from convnext_jax.training import loop
from convnext_jax.training.config import check, default_config
from convnext_jax.training.metrics import read_rows
from convnext_jax.training.network import initial_model
from convnext_jax.training.plan import Plan

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}

# Sections 3a, 3b, 3c and 10 of the recipe: setting, value. Dots lead into a nested one.
SCRATCH = {
    "dtype": "float32",
    "image_size": 224,
    "model.model_type": "convnext",
    "model.patch_size": 4,
    "model.layer_scale_init_value": 1e-6,
    "model.layer_norm_eps": 1e-6,
    "model.hidden_act": "gelu",
    "batch_size": 4096,
    "learning_rate": 4e-3,
    "min_learning_rate": 1e-6,
    "epochs": 300,
    "warmup_epochs": 20,
    "weight_decay": 0.05,
    "weight_decay_end": None,
    "layer_decay": 1.0,
    "adam_betas": (0.9, 0.999),
    "adam_eps": 1e-8,
    "gradient_clip": 0,
    "label_smoothing": 0.1,
    "ema_decay": 0.9999,
    "ema_warmup": False,
    "crop_scale": (0.08, 1),
    "crop_ratio": (3 / 4, 4 / 3),
    "shift": 0,
    "flip": 0.5,
    "augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
    "erase": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mix_prob": 1.0,
    "mix_switch_prob": 0.5,
    "mix_group": 128,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 224 / 256,
    "head_init_scale": 1.0,
    "freeze_backbone": False,
    "init_from": "",
    "init_averaged": False,
    "remat": False,
    "scan": False,
}
ISOTROPIC = {
    "model.model_type": "convnext_isotropic",
    "model.patch_size": 16,
    "model.layer_scale_init_value": 0,
    "warmup_epochs": 50,
}
PRE_TRAINING = {
    **SCRATCH,
    "epochs": 90,
    "warmup_epochs": 5,
    "ema_decay": 0,
    "mix_group": 32,
}
FINE_TUNING = {
    **SCRATCH,
    "batch_size": 512,
    "learning_rate": 5e-5,
    "epochs": 30,
    "warmup_epochs": 0,
    "weight_decay": 1e-8,
    "head_init_scale": 0.001,
    "mixup": 0,
    "cutmix": 0,
    "ema_decay": 0,
    "layer_decay": 0.8,
    "layer_decay_rule": "group",
}
DROP_PATH = "model.drop_path_rate"
REMAT = {"remat": True}
AVERAGED = {"ema_decay": 0.9999}
AT_384 = {"image_size": 384}
TINY_22K = {DROP_PATH: 0, "layer_decay": 0.8 ** (1 / 3), "layer_decay_rule": "single"}
V2 = {
    **SCRATCH,
    "dtype": "bfloat16",  # the commands have --use_amp
    "model.model_type": "convnextv2",
    "model.layer_scale_init_value": 0,
    "batch_size": 4 * 8 * 32,
    "mix_group": 32,
    "head_init_scale": 0.001,
}
# Of each file and row: the network, its number of classes, and the settings.
ROWS = {
    "imagenet1k": {
        "tiny": ("tiny", 1000, {**SCRATCH, DROP_PATH: 0.1}),
        "small": ("small", 1000, {**SCRATCH, DROP_PATH: 0.4}),
        "base": ("base", 1000, {**SCRATCH, DROP_PATH: 0.5}),
        "large": ("large", 1000, {**SCRATCH, **REMAT, DROP_PATH: 0.5, "mix_group": 64}),
        "isotropic_small": ("isotropic small", 1000, {**SCRATCH, **ISOTROPIC, DROP_PATH: 0.1}),
        "isotropic_base": ("isotropic base", 1000, {**SCRATCH, **ISOTROPIC, DROP_PATH: 0.2}),
        "isotropic_large": (
            "isotropic large",
            1000,
            {
                **SCRATCH,
                **ISOTROPIC,
                **REMAT,
                DROP_PATH: 0.5,
                "model.layer_scale_init_value": 1e-6,
                "mix_group": 64,
            },
        ),
    },
    "imagenet22k": {
        "tiny": ("tiny", 21841, {**PRE_TRAINING, DROP_PATH: 0.0}),
        "small": ("small", 21841, {**PRE_TRAINING, DROP_PATH: 0.0}),
        "base": ("base", 21841, {**PRE_TRAINING, DROP_PATH: 0.1}),
        "large": ("large", 21841, {**PRE_TRAINING, **REMAT, DROP_PATH: 0.1}),
        "xlarge": ("xlarge", 21841, {**PRE_TRAINING, **REMAT, DROP_PATH: 0.2}),
    },
    "finetune": {
        "1k_base_384": (
            "base",
            1000,
            {**FINE_TUNING, **AT_384, DROP_PATH: 0.8, "layer_decay": 0.7},
        ),
        "1k_large_384": (
            "large",
            1000,
            {**FINE_TUNING, **AT_384, **REMAT, DROP_PATH: 0.95, "layer_decay": 0.7},
        ),
        "22k_tiny_224": ("tiny", 1000, {**FINE_TUNING, **TINY_22K}),
        "22k_small_224": ("small", 1000, {**FINE_TUNING, DROP_PATH: 0.1}),
        "22k_base_224": ("base", 1000, {**FINE_TUNING, DROP_PATH: 0.2}),
        "22k_large_224": ("large", 1000, {**FINE_TUNING, **REMAT, DROP_PATH: 0.3}),
        "22k_xlarge_224": ("xlarge", 1000, {**FINE_TUNING, **REMAT, **AVERAGED, DROP_PATH: 0.4}),
        "22k_tiny_384": ("tiny", 1000, {**FINE_TUNING, **AT_384, **TINY_22K}),
        "22k_small_384": ("small", 1000, {**FINE_TUNING, **AT_384, DROP_PATH: 0.1}),
        "22k_base_384": ("base", 1000, {**FINE_TUNING, **AT_384, DROP_PATH: 0.2}),
        "22k_large_384": ("large", 1000, {**FINE_TUNING, **AT_384, **REMAT, DROP_PATH: 0.3}),
        "22k_xlarge_384": (
            "xlarge",
            1000,
            {**FINE_TUNING, **AT_384, **REMAT, **AVERAGED, DROP_PATH: 0.4},
        ),
    },
    "finetune_v2": {
        "base": (
            "V2 base",
            1000,
            {
                **V2,
                "learning_rate": 6.25e-4 * 1024 / 256,
                "epochs": 100,
                "warmup_epochs": 20,
                "layer_decay": 0.6,
                "layer_decay_rule": "group",
                DROP_PATH: 0.1,
            },
        ),
        "tiny": (
            "V2 tiny",
            1000,
            {
                **V2,
                "learning_rate": 8e-4 * 1024 / 256,
                "epochs": 300,
                "warmup_epochs": 40,
                "layer_decay": 0.9,
                "layer_decay_rule": "single",
                DROP_PATH: 0.2,
            },
        ),
        "atto": (
            "V2 atto",
            1000,
            {
                **V2,
                "learning_rate": 2e-4 * 1024 / 256,
                "epochs": 600,
                "warmup_epochs": 0,
                "layer_decay": 0.9,
                "layer_decay_rule": "single",
                "weight_decay": 0.3,
                "mixup": 0,
                "cutmix": 0,
                "label_smoothing": 0.2,
                DROP_PATH: 0.1,
            },
        ),
    },
}
# Parameters by number of classes, and billions of multiply-adds at 224 and 384 pixels.
NETWORKS = {
    "tiny": ({1000: 28_589_128, 21841: 44_615_857}, 4.456, 13.09),
    "small": ({1000: 50_223_688, 21841: 66_250_417}, 8.684, 25.52),
    "base": ({1000: 88_591_464, 21841: 109_953_489}, 15.355, 45.12),
    "large": ({1000: 197_767_336, 21841: 229_799_953}, 34.361, 100.98),
    "xlarge": ({1000: 350_196_968, 21841: 392_900_177}, 60.921, 179.03),
    "isotropic small": ({1000: 22_308_712}, 4.286, 12.6),
    "isotropic base": ({1000: 87_083_752}, 16.896, 49.65),
    "isotropic large": ({1000: 305_942_504}, 59.699, 175.44),
    "V2 base": ({1000: 88_717_800}, 15.355, 45.12),
    "V2 tiny": ({1000: 28_635_496}, 4.456, 13.09),
    "V2 atto": ({1000: 3_708_400}, 0.547, 1.61),
}
DEFAULT_ROWS = {
    "imagenet1k": "tiny",
    "imagenet22k": "base",
    "finetune": "22k_base_224",
    "finetune_v2": "base",
}
# Rows that are not published ones. A file that is named nowhere has one recipe and no argument.
OWN_ROWS = {"image_folder": ["scratch", "finetune", "probe"],
            "fashion_mnist": ["accelerator", "laptop"]}  # fmt: skip
ALL = [(name, row) for name in FILES for row in ROWS.get(name, OWN_ROWS.get(name, [None]))]
PUBLISHED = [(name, row) for name, rows in ROWS.items() for row in rows]
IMAGENET_1K, IMAGENET_22K = 1_281_167, 14_197_122


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FILES[name])
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def load(name: str, row: str | None = None) -> ConfigDict:
    return module(name).get_config(*([] if row is None else [row]))


def value_of(config: ConfigDict, path: str):
    for key in path.split("."):
        config = config[key]
    return config


# ---------------------------------------------------------------------------------- what they say


@pytest.mark.parametrize(("name", "row"), ALL)
def test_config(name, row):
    """The keys are those of the defaults, and nobody can misspell one."""
    config, defaults = load(name, row), default_config()
    if name.startswith("finetune") or row in ("finetune", "probe"):
        with pytest.raises(InputError, match="init_from is not set"):
            check(FrozenConfigDict(config))
        config.init_from = "somewhere"
    assert config.keys() == defaults.keys()
    assert config.model.keys() == defaults.model.keys()
    for level in (config, config.model):
        with pytest.raises(AttributeError):
            level.learning_rat = 1.0
    frozen = FrozenConfigDict(config)
    check(frozen)
    plan = Plan(frozen, examples=50_000)
    assert 0 <= plan.warmup_steps < plan.total_steps
    if config.model.depths:  # otherwise the checkpoint says
        assert len(config.model.depths) == len(config.model.hidden_sizes)
        assert config.model.drop_path_rate < 1


def test_there_are_configs():
    names = {"cifar10", "digits", "fashion_mnist", "image_folder", "imagenette"}
    assert names | ROWS.keys() <= FILES.keys()


def test_rows_and_table_name_the_same():
    """So that a new row cannot go untested."""
    for name, rows in OWN_ROWS.items():
        assert list(module(name).ROWS) == rows
        assert load(name) == load(name, rows[0])
        with pytest.raises(InputError, match="has no row 'other'"):
            load(name, "other")
    for name, rows in ROWS.items():
        assert list(module(name).ROWS) == list(rows)
        assert load(name) == load(name, DEFAULT_ROWS[name])
        for row in rows:
            assert f"\n    {row} " in FILES[name].read_text(encoding="utf-8"), (name, row)
    assert len({str(load(name, row)) for name, row in PUBLISHED}) == len(PUBLISHED)


@pytest.mark.parametrize(("name", "row"), PUBLISHED)
def test_published_row(name, row):
    config, (_, _, published) = load(name, row), ROWS[name][row]
    for path, value in published.items():
        if isinstance(value, float):  # products are written differently here
            value = pytest.approx(value, rel=1e-12)
        assert value_of(config, path) == value, path


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("row", ["bas", "", "base:large"])
def test_a_row_that_does_not_exist(name, row):
    with pytest.raises(InputError) as error:
        load(name, row)
    assert "\n" not in str(error.value)
    for part in (repr(row), f"{name}.py", *ROWS[name]):
        assert part in str(error.value)


def test_the_command_line_takes_a_row_and_names_the_rows(tmp_path):
    def train(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "train.py", *arguments, "--workdir", str(tmp_path / "run")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr

    code, text = train("--config", "configs/imagenet1k.py:bas")
    assert code == 2
    assert text.startswith("train.py: ")
    assert text.count("\n") == 1
    assert "there is no row 'bas'" in text
    assert "Traceback" not in text
    code, text = train("--config", "configs/cifar10.py:tiny")
    assert code == 2
    assert "no rows" in text
    assert text.count("\n") == 1
    code, text = train("--config", "configs/imagenet1k.py:base", "--config.data.folder=nowhere")
    assert code == 2
    assert "nowhere" in text
    assert text.count("\n") == 1


# -------------------------------------------------------------------------------- what they build


@pytest.mark.parametrize(("name", "row"), PUBLISHED)
def test_published_network(name, row):
    network, count, _ = ROWS[name][row]
    parameters, at_224, at_384 = NETWORKS[network]
    config = load(name, row)
    assert config.plan_classes == count
    fields = config.model
    fields.drop_path_rate = 0.0  # rows that differ in it alone have the same network
    assert parameter_count(FrozenConfigDict(fields), count) == parameters[count]
    config = ConvNextConfig(num_stages=len(fields.depths), num_labels=1000, **fields)
    assert round(multiply_adds(config, 224) / 1e9, 3) == at_224
    assert round(multiply_adds(config, 384) / 1e9, 2) == at_384


@functools.cache
def parameter_count(fields: FrozenConfigDict, classes: int) -> int:
    config = default_config()
    config.model.update(fields)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(parameters_of(config, classes)))


def parameters_of(config: ConfigDict, classes: int):
    """Shapes of what a run starts from."""
    names, frozen = tuple(f"class {i}" for i in range(classes)), FrozenConfigDict(config)
    return jax.eval_shape(lambda key: initial_model(frozen, names, key)[1], jax.random.key(0))


@pytest.mark.parametrize(("name", "row"), [pair for pair in ALL if pair not in PUBLISHED])
def test_network(name, row):
    config = load(name, row)
    if not config.model.depths:
        pytest.skip("the network is the checkpoint's")
    assert parameters_of(config, 10)["classifier"]["kernel"].shape[1] == 10


@pytest.mark.parametrize(
    ("name", "row", "examples", "steps", "warmup", "total"),
    [
        ("imagenet1k", "tiny", IMAGENET_1K, 312, 6_240, 93_600),
        ("imagenet1k", "isotropic_large", IMAGENET_1K, 312, 15_600, 93_600),
        ("imagenet22k", "base", IMAGENET_22K - 14_197, 3_462, 17_310, 311_580),
        ("finetune", "22k_xlarge_384", IMAGENET_1K, 2_502, 0, 75_060),
        ("finetune_v2", "base", IMAGENET_1K, 1_251, 25_020, 125_100),
        ("finetune_v2", "tiny", IMAGENET_1K, 1_251, 50_040, 375_300),
        ("finetune_v2", "atto", IMAGENET_1K, 1_251, 0, 750_600),
    ],
)
def test_published_steps(name, row, examples, steps, warmup, total):
    config = load(name, row)
    assert config.plan_examples == examples
    plan = Plan(FrozenConfigDict(config), examples)
    assert (plan.steps_per_epoch, plan.warmup_steps, plan.total_steps) == (steps, warmup, total)


@pytest.mark.parametrize(
    ("name", "row", "accumulation", "images"),
    [
        ("imagenet1k", "tiny", 4, 128),
        ("imagenet1k", "isotropic_large", 8, 64),
        ("imagenet22k", "xlarge", 16, 32),
        ("finetune_v2", "base", 4, 32),
    ],
)
def test_one_machine_of_the_authors(name, row, accumulation, images):
    """Eight GPUs and their commands' accumulation: a GPU's images share a draw of mixup."""
    config = load(name, row)
    config.gradient_accumulation = accumulation
    assert config.batch_size == 8 * accumulation * images
    assert Plan(FrozenConfigDict(config), IMAGENET_1K, devices=8).mix_group == images
    with pytest.raises(InputError, match=r"batch_size is 4096|batch_size is 1024"):
        Plan(FrozenConfigDict(config), IMAGENET_1K, devices=7)


def test_22k_is_evaluated_at_the_end_alone():
    plan = Plan(FrozenConfigDict(load("imagenet22k", "base")), IMAGENET_22K)
    assert plan.eval_every == plan.total_steps


# ------------------------------------------------------------------------------- their first steps

QUICK = [
    ("imagenet1k", "small"),
    ("imagenet22k", "large"),  # computes its blocks twice
    ("finetune", "22k_base_384"),
    ("finetune_v2", "tiny"),
    ("image_folder", "finetune"),
    ("image_folder", "probe"),
]
STEPS, CLASSES = 3, ("blue", "green", "red")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of 24 and 6 small pictures of three classes, told apart by their colour."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for channel, name in enumerate(reversed(CLASSES)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(0, 100, (40, 36, 3), np.uint8)
                picture[..., channel] += 120
                Image.fromarray(picture).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def quick_compilation():
    """Compiling takes most of such a run, and speed is not looked at."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def shrink(config: ConfigDict, pictures: Path) -> ConfigDict:
    """Three steps of a network that compiles fast; whatever is not of a size stays."""
    # The paper's groups are of four stages.
    stages = 4 if config.layer_decay < 1 and config.layer_decay_rule == "group" else 2
    isotropic = config.model.model_type == "convnext_isotropic"
    config.data.folder = str(pictures)
    config.image_size = 32
    config.model.depths = (2,) if isotropic else (1,) * stages
    config.model.hidden_sizes = (8,) if isotropic else (4, 8, 12, 16)[:stages]
    config.batch_size = 8
    config.eval_batch_size = 0
    config.epochs = 1.0
    config.warmup_epochs = min(config.warmup_epochs, 2 / STEPS)
    config.log_every_steps = 1
    config.loader_workers = 2
    return config


def starting_point(config: ConfigDict, folder: Path, classes: int) -> dict:
    """Writes a checkpoint of the toy network for fine-tuning to start from; its parameters."""
    toy = ConvNextConfig(
        num_stages=len(config.model.depths),
        depths=config.model.depths,
        hidden_sizes=config.model.hidden_sizes,
        model_type=config.model.model_type,
        image_size=config.image_size,
        num_labels=classes,
    )
    cls = ConvNextForImageClassification if classes else ConvNextModel
    variables = cls(toy).init_variables(jax.random.key(7))
    cls(toy).save_pretrained(folder, variables)
    return variables["params"] if classes else {"convnext": variables["params"]}


OWN = [pair for pair in ALL if pair not in PUBLISHED]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        pytest.param(
            *pair, marks=[] if pair in QUICK else pytest.mark.slow, id="-".join(map(str, pair))
        )
        for pair in OWN
    ],
)
def test_first_steps_of_our_own(name, row, pictures, tmp_path, capsys, quick_compilation):
    config = load(name, row)
    with config.unlocked():
        config.data = ConfigDict({"name": "image_folder", "folder": str(pictures)})
    is_open = not config.model.depths
    shrink(config, pictures)
    if is_open:
        start = starting_point(config, tmp_path / "start", 5)
        config.init_from = str(tmp_path / "start")
        config.model.depths = config.model.hidden_sizes = ()
    loop.train(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3]
    assert all(0 < row.get("train/loss", 1) < 10 for row in rows)
    if is_open:
        _, trained = ConvNextForImageClassification.from_pretrained(tmp_path / "run" / "model")
        stays = jax.tree.map(np.array_equal, start["convnext"], trained["params"]["convnext"])
        assert all(jax.tree.leaves(stays)) == (row == "probe")
        assert "a new head for 3 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "row"),
    [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in PUBLISHED],
)
def test_first_steps(name, row, pictures, tmp_path, capsys, quick_compilation):
    published = ROWS[name][row][2]
    config, start = shrink(load(name, row), pictures), None
    if name.startswith("finetune"):
        config.init_from = str(tmp_path / "start")
        # As many classes from ImageNet-1k, others from ImageNet-22k, no head from FCMAE.
        count = 0 if name == "finetune_v2" else 3 if row.startswith("1k_") else 5
        start = starting_point(config, tmp_path / "start", count)
    if (name, row) == ("imagenet1k", "small"):
        config.gradient_accumulation = 2
    final = loop.train(config, tmp_path / "run")
    printed = capsys.readouterr().out

    steps = [line for line in read_rows(tmp_path / "run/metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(0 < line["train/loss"] < 10 for line in steps)
    assert all(0 < line["train/gradient_norm"] < math.inf for line in steps)
    # The row's learning rate, from its first step or where the warm-up ends.
    peak, warmup = published["learning_rate"], published["warmup_epochs"]
    assert steps[0]["train/learning_rate"] == pytest.approx(0 if warmup else peak)
    assert steps[2 if warmup else 0]["train/learning_rate"] == pytest.approx(peak)
    # Both weights are evaluated where the row averages them.
    assert 0 <= final["val/top1"] <= 1
    assert ("val_ema/top1" in final) == (published["ema_decay"] > 0)
    # The table of groups, by the row's rule.
    layers = {int(found) for found in re.findall(r"layer_(\d+)_decay", printed)}
    if published["layer_decay"] == 1:
        assert layers == set()
        assert re.search(r"\bno_decay\b", printed)
    elif published["layer_decay_rule"] == "group":
        assert layers == {0, 1, 2, 3, 12, 13}
    else:
        assert layers == {1, 2, 3}
    if start is not None:
        _, trained = ConvNextForImageClassification.from_pretrained(tmp_path / "run" / "model")
        has_new_head = "classifier" not in start or count == 5
        check_movement(start, trained["params"], published, has_new_head)
        # A head that is scaled down says that all classes are alike.
        if has_new_head:
            assert steps[0]["train/loss"] == pytest.approx(math.log(3), abs=2e-3)


def check_movement(start: dict, end: dict, published: dict, has_new_head: bool) -> None:
    """Each layer moved as far as Adam goes at its own learning rate, starting at the checkpoint.

    Adam's first steps are as long as the learning rate, whatever the gradient. Layer scale keeps
    those of the blocks near its epsilon, so that the layers between the stages are looked at.
    """
    last, ids = 13, {"stem": 0, 1: 2, 2: 3, 3: 12, "norm": 13}
    if published["layer_decay_rule"] == "single":
        last, ids = 3, {"stem": 1, 1: 2, "norm": 3}
    average = published["ema_decay"]

    def layer(params: dict, place) -> np.ndarray:
        if place == "stem":
            return np.asarray(params["convnext"]["embeddings"]["patch_embeddings"]["bias"])
        if place == "norm":
            return np.asarray(params["convnext"]["layernorm"]["bias"])
        return np.asarray(
            params["convnext"]["encoder"][f"stages_{place}"]["downsampling_layer_1"]["bias"]
        )

    for place, layer_id in ids.items():
        step = published["learning_rate"] * published["layer_decay"] ** (last - layer_id)
        step *= 1 - average**STEPS if average else 1
        moved = np.abs(layer(end, place) - layer(start, place)).max()
        assert moved <= 1.05 * STEPS * step, place
        assert moved >= 0.2 * step, place
    if has_new_head:
        kernel = np.abs(end["classifier"]["kernel"])
        assert kernel.max() < 6 * 0.001 * 0.02 + 1.05 * STEPS * published["learning_rate"]
