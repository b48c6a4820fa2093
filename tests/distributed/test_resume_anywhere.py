"""The trainer goes on from a checkpoint of any layout: with the same samples in the same order, and the same losses."""

from __future__ import annotations

import shutil

import pytest

from tests import family_models
from tests.cli.example import alpaca_rows, save_tokenizer, train_words, workplace, write_rows
from tests.distributed.trained import Trained, train_on

# the order in which ranks add up a gradient differs between layouts, in the last bits of fp32; three steps of Adam,
# which divides by its root, widen that
ROUNDING = 1e-5

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
LORA = {"use_lora": True, "lora_rank": 4}
NOISY = LORA | {"lora_dropout": 0.2, "neftune_noise_alpha": 5.0}


def words(save: str, load: str | None = None, model: str = "model", **options) -> list[str]:
    """Six steps of four samples, saved after the third and the last; 14 samples an epoch, so that two are begun."""
    resumed = {"load": f"{load}/iter_0000003"} if load else {}
    return train_words(
        model,
        "rows.json",
        save,
        **{"train_iters": 6, "save_interval": 3, "lr_warmup_iters": 2, "report": False, "tensorboard": False},
        **resumed,
        **options,
    )


# name -> (ranks, words) of the runs that are saved, and of those that go on from one of them
SAVED = {
    "one": (1, words("one")),
    "lora": (1, words("lora", **LORA)),
    "experts": (1, words("experts", model="experts_model")),
    "tp2": (2, words("tp2", **TP2)),
    "dp2": (2, words("dp2")),
    "lora_tp2": (2, words("lora_tp2", **TP2, **LORA)),
    "ep2": (2, words("ep2", model="experts_model", **EP2)),
    "noisy": (2, words("noisy", **NOISY)),
    "tp2_dp2": (4, words("tp2_dp2", **TP2)),
}
RESUMED = {
    "tp2 on one rank": (1, words("tp2_1", "tp2")),
    "a node lost": (1, words("dp2_1", "dp2")),
    "lora, tp2 on one rank": (1, words("lora_1", "lora_tp2", **LORA)),
    "experts from two ranks": (1, words("ep2_1", "ep2", model="experts_model")),
    "noisy, another layout": (1, words("noisy_1", "noisy", **NOISY)),
    "noisy, once more": (1, words("noisy_2", "noisy", **NOISY)),
    "one as pp2": (2, words("pp2", "one", **PP2)),
    "half of tp2 dp2": (2, words("half", "tp2_dp2", **TP2)),
    "lora as pp2": (2, words("lora_pp2", "lora", **PP2, **LORA)),
    "experts on two ranks": (2, words("ep_2", "experts", model="experts_model", **EP2)),
    "noisy, the same layout": (2, words("noisy_same", "noisy", **NOISY)),
    "damaged": (2, words("damaged", **NOISY)),
}


def _train(runs: dict[str, tuple[int, list[str]]]) -> dict[str, Trained]:
    """The runs of as many ranks share a job."""
    done: dict[str, Trained] = {}
    for size in sorted({ranks for ranks, _ in runs.values()}):
        names = [name for name, (ranks, _) in runs.items() if ranks == size]
        done |= dict(zip(names, train_on(size, [runs[name][1] for name in names]), strict=True))
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every run above by its name."""
    with workplace(tmp_path_factory.mktemp("anywhere")) as root:
        family_models.save("mixtral", root / "experts_model")
        save_tokenizer(root / "experts_model")
        write_rows(root / "rows.json", alpaca_rows(14))
        saved = _train(SAVED)
        shutil.copytree("noisy", "damaged")
        for shard in (root / "damaged" / "iter_0000006").glob("__1_*.distcp"):
            shard.write_bytes(bytes(shard.stat().st_size))
        yield saved | _train(RESUMED)


@pytest.mark.parametrize(
    ("resumed", "unbroken"),
    [
        ("tp2 on one rank", "one"),
        ("a node lost", "one"),
        ("one as pp2", "one"),
        ("half of tp2 dp2", "one"),
        ("lora, tp2 on one rank", "lora"),
        ("lora as pp2", "lora"),
        ("experts from two ranks", "experts"),
        ("experts on two ranks", "experts"),
    ],
)
def test_another_layout_goes_on_with_the_same_samples_and_losses(trained, resumed, unbroken):
    ours, whole = trained[resumed], trained[unbroken]
    assert ours.refused is None
    assert [line["step"] for line in ours.lines] == [4, 5, 6]
    assert ours.samples == whole.samples[3:]
    assert len({tuple(batch) for batch in whole.samples}) == 6
    assert ours.losses == pytest.approx(whole.losses[3:], rel=ROUNDING)
    assert [line["lr"] for line in ours.lines] == [line["lr"] for line in whole.lines[3:]]
    assert [line["supervised_tokens"] for line in ours.lines] == [line["supervised_tokens"] for line in whole.lines[3:]]


def test_the_same_layout_goes_on_to_the_bit_where_numbers_are_random(trained):
    ours, whole = trained["noisy, the same layout"], trained["noisy"]
    assert ours.samples == whole.samples[3:]
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in ours.lines] == [line[name] for line in whole.lines[3:]]


def test_random_numbers_of_another_layout_follow_a_rule(trained):
    once, again, whole = trained["noisy, another layout"], trained["noisy, once more"], trained["noisy"]
    assert once.losses == again.losses
    assert once.samples == whole.samples[3:]
    assert once.losses != pytest.approx(whole.losses[3:], rel=1e-4)  # they were drawn by two ranks before


def test_a_checkpoint_that_one_rank_finds_damaged_is_passed_over_by_all(trained):
    """Each rank reads its share of the files against their checksums."""
    ours, whole = trained["damaged"], trained["noisy"]
    assert ours.refused is None and ours.samples == whole.samples[3:]
    assert ours.losses[-3:] == whole.losses[3:]
