"""Fine-tune from Python: a config file, early stopping, and what comes back.

python examples/train_sft.py --config examples/sft_alpaca.yaml [--no-wandb] [--nproc 2] [--patience 3]
"""

import argparse

from primus_bridge import Callback, ConfigError, SFTConfig, SFTTrainer, ValidationCallback


class Spikes(Callback):
    """A callback of one's own: tells when the loss jumps. With several ranks it lives in rank 0."""

    def __init__(self, factor=2.0):
        self.factor, self.before = factor, None

    def on_step_end(self, state, metrics):
        if not metrics:  # a step that is not logged
            return
        if self.before is not None and metrics["loss"] > self.factor * self.before:
            print(f"step {state.step}: the loss went from {self.before:.3f} to {metrics['loss']:.3f}")
        self.before = metrics["loss"]


def main():
    parser = argparse.ArgumentParser(description="Fine-tune a model from an SFTConfig file")
    parser.add_argument("--config", required=True, help="a YAML file")
    parser.add_argument("--no-wandb", action="store_true", help="log to files only")
    parser.add_argument("--nproc", type=int, help="local ranks; default: as many as the layout or the GPUs")
    parser.add_argument("--patience", type=int, help="stop after so many evaluations without a lower loss")
    words = parser.parse_args()
    overrides = {"nproc": words.nproc}
    if words.no_wandb:
        overrides["use_wandb"] = False
    callbacks = [Spikes()]
    if words.patience:
        callbacks.append(ValidationCallback(patience=words.patience))
    try:
        config = SFTConfig.from_yaml(words.config, **overrides)
        result = SFTTrainer(config, callbacks=callbacks).train()
    except ConfigError as error:
        parser.error(str(error))
    loss, folder = result["train_loss"], result["hf_folder"]  # None when a signal ends the run early
    trained = "no training loss" if loss is None else f"training loss {loss:.4f}"
    print(f"{trained} over {result['steps']} steps; exported to {folder or 'no folder'}")


# every rank imports this file: only the one that was started trains
if __name__ == "__main__":
    main()
