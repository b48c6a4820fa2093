"""Callbacks in real runs: the hooks in their order, errors, early stopping, the best checkpoint, Weights & Biases."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from primus_bridge.cli.main import main
from tests.callbacks.wandb_file import offline_runs
from tests.cli.example import loss_lines, train_words, tree

RECORDER = """
from primus_bridge import Callback

told = []

class Recorder(Callback):
    def on_train_start(self, state): told.append(("train start", state.step, state.train_iters))
    def on_step_start(self, state): told.append(("step start", state.step))
    def on_step_end(self, state, metrics): told.append(("step end", state.step, metrics.get("step")))
    def on_eval_end(self, state, metrics): told.append(("eval end", state.step, metrics["step"]))
    def on_save(self, state, path): told.append(("save", state.step, path.name))
    def on_error(self, state, error): told.append(("error", state.step, type(error).__name__))
    def on_train_end(self, state): told.append(("train end", state.step, state.tokens > 0))

class Raising(Recorder):
    def on_step_end(self, state, metrics):
        if state.step == 2:
            self.fail()

    def fail(self):
        raise RuntimeError("a bad day")
"""


def words(save: str, *callbacks, **options) -> list[str]:
    usual = dict(validation_data_path="held_out.json", callbacks=f"[{', '.join(callbacks)}]" if callbacks else None)
    return train_words("model", "rows.json", save, tensorboard=False, report=False, **usual | options)


def evaluations(save) -> dict[int, float]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def test_hooks_in_their_order_and_after_a_resume(root, module):
    module("recorder", RECORDER)
    options = dict(eval_interval=2, save_interval=2, log_interval=2)
    assert main(words("hooks", "recorder.Recorder", train_iters=3, **options)) == 0
    told = sys.modules["recorder"].told
    assert told == [
        ("train start", 0, 3),
        ("step start", 0),
        ("step end", 1, None),
        ("step start", 1),
        ("step end", 2, 2),
        ("eval end", 2, 2),
        ("save", 2, "iter_0000002"),
        ("step start", 2),
        ("step end", 3, 3),
        ("eval end", 3, 3),
        ("save", 3, "iter_0000003"),
        ("train end", 3, True),
    ]
    told.clear()
    assert main(words("hooks", "recorder.Recorder", train_iters=4, **options)) == 0
    assert told[:2] == [("train start", 3, 4), ("step start", 3)] and told[-1][:2] == ("train end", 4)


def test_a_callback_that_raises_ends_the_run_with_one_message(root, module, capfd):
    path = module("raising", RECORDER)
    assert main(words("raised", "raising.Recorder", "raising.Raising", train_iters=4)) == 2
    line = RECORDER.splitlines().index('        raise RuntimeError("a bad day")') + 1
    assert capfd.readouterr().err == (
        f"primus: {path}:{line}: callback Raising raised RuntimeError: a bad day (in on_step_end at step 2); "
        "mend it, or take it out of the callbacks\n"
    )
    told = sys.modules["raising"].told
    assert told[-2:] == [("error", 2, "ConfigError")] * 2  # both are told, and no train end
    assert [line["step"] for line in loss_lines(root / "raised")] == [1, 2]


def test_early_stopping_goes_on_where_it_was(root, capfd):
    # nothing is lower by 100: the first evaluation stays the best
    given = "{path: ValidationCallback, eval_steps: 2, patience: 2, min_delta: 100.0}"
    assert main(words("early", given, train_iters=12)) == 0
    assert list(evaluations(root / "early")) == [2, 4, 6]
    best = evaluations(root / "early")[2]
    out = capfd.readouterr().out
    brought = f"evaluations brought no loss lower by more than 100 than {best:.4f} at step 2"
    assert f"at step 6 of 12: 2 {brought}\n" in out
    assert (root / "early" / "latest_checkpointed_iteration.txt").read_text() == "6"
    # it has ended: the same command moves nothing, and exports what is there
    before = (root / "early" / "metrics.jsonl").read_bytes()
    assert main(words("early", given, train_iters=12, convert_to_hf=True)) == 0
    assert f"at step 6 of 12: 2 {brought}; a patience above 2 goes on\n" in capfd.readouterr().out
    assert (root / "early" / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert (root / "early" / "metrics.jsonl").read_bytes() == before
    assert (root / "early" / "hf" / "config.json").is_file()
    # the resumed run knows of them, so the next one is the third in a row
    assert main(words("early", given.replace("patience: 2", "patience: 3"), train_iters=12, log_interval=10)) == 0
    assert list(evaluations(root / "early")) == [2, 4, 6, 8]
    assert f"3 {brought}\n" in capfd.readouterr().out
    assert [line["step"] for line in loss_lines(root / "early")] == [1, 2, 3, 4, 5, 6, 8]


def test_the_best_checkpoint_outlives_the_others(root):
    given = "{path: CheckpointCallback, save_steps: 3, save_best: true}"
    options = dict(train_iters=8, eval_interval=1, save_total_limit=1, lr="3e-2")
    assert main(words("best", given, **options)) == 0
    losses = evaluations(root / "best")
    step = min(losses, key=losses.get)
    assert 1 < step < 8  # it gets worse again, or the test says nothing
    kept = json.loads((root / "best" / "best.json").read_text())
    assert kept == {"checkpoint": f"iter_{step:07d}", "step": step, "eval_loss": losses[step]}
    assert sorted(path.name for path in (root / "best").glob("iter_*")) == [f"iter_{step:07d}", "iter_0000008"]


def test_a_better_checkpoint_replaces_the_best(root):
    given = "{path: CheckpointCallback, save_best: true}"
    assert main(words("better", given, train_iters=3, eval_interval=1, save_total_limit=1)) == 0
    losses = list(evaluations(root / "better").values())
    assert losses == sorted(losses, reverse=True)
    assert [path.name for path in (root / "better").glob("iter_*")] == ["iter_0000003"]


def test_the_best_is_one_of_this_history(root, capfd):
    given = "{path: CheckpointCallback, save_best: true}"
    options = dict(train_iters=4, eval_interval=2, save_interval=2)
    save, best = root / "rewound", root / "rewound" / "best.json"

    def named() -> dict:
        return {"checkpoint": f"iter_{step:07d}", "step": step, "eval_loss": evaluations(save)[step]}

    assert main(words("rewound", given, **options)) == 0
    step = 4
    assert json.loads(best.read_text()) == named()
    best.write_text(json.dumps(named() | {"checkpoint": "iter_0000002", "step": 2}))  # as if killed before it was named
    assert main(words("rewound", given, **options)) == 0
    assert json.loads(best.read_text()) == named()
    shutil.rmtree(save / "iter_0000004")
    assert main(words("rewound", given, **options | {"lr": "3.0"})) == 0
    assert evaluations(save)[4] > evaluations(save)[2]
    step = 2
    assert json.loads(best.read_text()) == named()
    assert main(words("rewound", **options)) == 0  # kept by a run that does not ask for it
    assert json.loads(best.read_text()) == named()
    for folder in save.glob("iter_*"):
        shutil.rmtree(folder)
    assert main(words("rewound", **options)) == 0
    assert not best.exists()


def test_wandb_offline_holds_the_numbers_and_goes_on(root, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = dict(eval_interval=2, wandb_project="tries", wandb_exp_name="first")
    assert main(words("tracked", train_iters=4, **options)) == 0
    assert main(words("tracked", train_iters=6, **options)) == 0
    first, second = offline_runs(root / "tracked")
    assert first.id == second.id and first.project == "tries"
    assert (first.exit_code, second.exit_code) == (0, 0)
    lines = [json.loads(line) for line in (root / "tracked" / "metrics.jsonl").read_text().splitlines()]
    expected = [
        {"step": line["step"]}
        | {
            f"{'eval' if 'eval_loss' in line else 'train'}/{name.removeprefix('eval_')}": value
            for name, value in line.items()
            if name != "step"
        }
        for line in lines
    ]
    assert first.history + second.history == expected
    assert first.config["optimizer"]["lr"] == 1e-3
    assert first.config["sources"]["optimizer.lr"] == "command line --lr"
    losses = [line["loss"] for line in lines if "loss" in line]
    assert second.summary["train_loss"] == pytest.approx(sum(losses) / 6) and second.summary["steps"] == 6
    assert second.summary["best_eval_loss"] == min(evaluations(root / "tracked").values())


def test_wandb_marks_a_failed_run(root, module, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    module("failing", RECORDER)
    # between two log steps: the last step done is logged all the same
    assert main(words("failed", "failing.Raising", train_iters=4, log_interval=10, wandb_project="tries")) == 2
    assert [line["step"] for line in loss_lines(root / "failed")] == [2]
    (run,) = offline_runs(root / "failed")
    assert run.exit_code == 1 and "a bad day" in run.summary["error"]
    assert [row["step"] for row in run.history] == [2]


LOSING = """
import os, signal, time
from pathlib import Path
from primus_bridge import Callback

class Losing(Callback):
    def on_step_end(self, state, metrics):
        if state.step == 2:
            (service,) = [child for child in self.children() if b"wandb" in Path(f"/proc/{child}/cmdline").read_bytes()]
            os.kill(service, signal.SIGKILL)
            while b"wandb" in Path(f"/proc/{service}/cmdline").read_bytes():  # a zombie has none
                time.sleep(0.01)

    def children(self):
        tasks = Path("/proc/self/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]
"""


@pytest.mark.parametrize("train_iters", [2, 5])
def test_a_lost_wandb_loses_no_training(root, module, monkeypatch, capfd, train_iters):
    monkeypatch.setenv("WANDB_MODE", "offline")
    module("losing", LOSING)
    save = f"lost{train_iters}"
    options = dict(wandb_project="tries", convert_to_hf=True, eval_interval=3)
    assert main(words(save, "losing.Losing", train_iters=train_iters, **options)) == 0
    told = capfd.readouterr()
    assert told.out.count("Weights & Biases lost: ") == 1 and "Traceback" not in told.err
    assert "the run goes on, metrics.jsonl has everything" in told.out
    assert [line["step"] for line in loss_lines(root / save)] == list(range(1, train_iters + 1))
    assert (root / save / f"iter_{train_iters:07d}" / "manifest.json").is_file()
    assert (root / save / "hf" / "config.json").is_file()


@pytest.fixture
def online(root, monkeypatch):
    """Logging without a key, in a home folder without one."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("NETRC", str(root / "none"))
    return dict(train_iters=1, wandb_project="tries", wandb_mode="online")


def test_wandb_without_a_key_is_refused_with_nothing_written(root, online, capfd):
    before = tree(root)
    assert main(words("online", **online)) == 2
    assert capfd.readouterr().err == (
        "primus: command line --wandb_project: Weights & Biases has no key for https://api.wandb.ai: log in with "
        "`wandb login` or set WANDB_API_KEY, keep the run here with --wandb_mode offline, or leave it out with "
        "--no-wandb\n"
    )
    assert tree(root) == before


def test_wandb_that_does_not_start_says_how_to_go_on(root, online, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "no key")
    assert main(words("online", **online)) == 2
    told = capfd.readouterr().err
    assert "primus: command line --wandb_project: Weights & Biases does not start: WANDB_API_KEY invalid" in told
    assert "--wandb_mode offline" in told and "Traceback" not in told
