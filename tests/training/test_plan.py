"""What a run says of itself before it starts, and what it refuses."""

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from convnext_jax import ConvNextConfig, ConvNextForImageClassification, InputError
from convnext_jax.data import sources
from convnext_jax.training.config import check, default_config, peak_learning_rate
from convnext_jax.training.plan import Plan, print_plan


def settings(**changes) -> FrozenConfigDict:
    config = default_config()
    config.update({"batch_size": 64, "mix_group": 16, "epochs": 10.0, "warmup_epochs": 1.0})
    config.update(changes)
    return FrozenConfigDict(config)


def test_epochs_in_steps():
    plan = Plan(settings(checkpoint_every_epochs=0.5), examples=1000)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (15, 150, 15)
    assert (plan.eval_every, plan.checkpoint_every, plan.eval_batch_size) == (15, 7, 64)


def test_the_paper_s_run_has_its_steps():
    plan = Plan(FrozenConfigDict(default_config()), examples=1_281_167)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (312, 93_600, 6240)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation": 3}, "batch_size is 64: give a multiple of 3"),
        ({"mix_group": 48}, "mix_group is 48 and a device computes 64 examples"),
        ({"gradient_accumulation": 2, "mix_group": 20}, "computes 32 examples at a time"),
        ({"batch_size": 2048}, "there are 1000 training examples"),
        ({"warmup_epochs": 10.0}, "warmup_epochs is 10.0 of 10.0"),
    ],
)
def test_layouts_that_do_not_work_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Plan(settings(**changes), examples=1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": "rand-m9-mstd0.5-inc1-zz"}, "zz"),
        ({"mixup": -0.1}, "mixup is -0.1"),
        ({"erase": 2.0}, "erase is 2.0"),
        ({"mean": (1.2, 0.5, 0.5)}, "mean is"),
        ({"seed": 2**64}, "seed is"),
        ({"tune_fraction": 1.0}, "tune_fraction is 1.0"),
        ({"layer_decay": 0.0, "init_from": "x"}, "layer_decay is 0.0"),
        ({"layer_decay": 0.8}, "init_from is not set"),
        ({"freeze_backbone": True}, "init_from is not set"),
        ({"layer_decay_rule": "both"}, "layer_decay_rule is 'both'"),
        ({"shift": 500}, "shift is 500"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0"),
    ],
)
def test_settings_that_no_run_can_be_made_with(changes, message):
    check(settings())
    with pytest.raises(InputError, match=message):
        check(settings(**changes))


def test_the_learning_rate_follows_the_batch_only_when_asked():
    assert peak_learning_rate(settings(learning_rate=4e-3)) == 4e-3
    scaled = settings(learning_rate=4e-3, learning_rate_batch=256)
    assert peak_learning_rate(scaled) == pytest.approx(1e-3)


def test_what_is_printed(capsys, tmp_path):
    dataset = sources.load("digits")
    config = settings(ema_decay=0.9999)
    # With two classes; 1,000 make it 4.46 G.
    model = ConvNextForImageClassification(ConvNextConfig.preset("tiny"))
    params = {"kernel": np.zeros((3, 7))}
    print_plan(config, Plan(config, len(dataset.train)), dataset, model, params, tmp_path)
    said = capsys.readouterr().out
    for part in (
        "64 in effect",
        "0.004 at its peak",
        "220 (22 an epoch), of which warm-up 22",
        "14,080 seen in 10 epochs",
        "21 parameters",
        "4.45 G multiply-adds a picture",
        "horizon 10,000 steps; 97.8% of the initial weights are left",
    ):
        assert part in said, said
