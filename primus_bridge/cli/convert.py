"""``primus convert``, the same as ``python -m primus.cli.convert``: checkpoints between Hugging Face and Megatron."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from primus_bridge.errors import ConfigError, did_you_mean

EXAMPLES = """\
examples:
  Hugging Face -> Megatron, for tensor parallel 2:
    primus convert --framework megatron_bridge --convert_from_hf --hf_model_name_or_path HF_DIR --save CKPT \\
        --tensor_model_parallel_size 2
  Megatron -> Hugging Face:
    primus convert --framework megatron_bridge --load CKPT --convert_to_hf --hf_save_path OUT
  a LoRA checkpoint -> a PEFT folder, or merged into the base model:
    primus convert --load CKPT --convert_to_hf --hf_save_path OUT --adapter_only
    primus convert --load CKPT --convert_to_hf --hf_save_path OUT --merge
  a PEFT folder, trained elsewhere -> a LoRA checkpoint to train further, export again or merge:
    primus convert --framework megatron_bridge --adapter PEFT_DIR --hf_model_name_or_path HF_DIR --save CKPT
"""

DTYPES = ("fp32", "bf16", "fp16")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors, with a suggestion for an unknown option."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        options = [option for action in self._actions for option in action.option_strings]
        # --max-shard-size is --max_shard_size, as in primus train
        argv = [
            "--" + word[2:].replace("-", "_") if word.startswith("--") and "=" not in word else word for word in argv
        ]
        values, unknown = self.parse_known_args(argv)
        if unknown:
            raise ConfigError(
                f"unknown option '{unknown[0]}'{did_you_mean(unknown[0], options)}; see {self.prog} --help"
            )
        return values


def parser() -> Parser:
    """The options of the command."""
    p = Parser(
        prog="primus convert",
        description="Checkpoints between Hugging Face folders and Megatron, in both directions, at any layout.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    p.add_argument("-h", "--help", action="store_true", help="this text")
    p.add_argument("--framework", default="megatron_bridge", metavar="NAME", help="megatron_bridge, the only one here")
    p.add_argument("--convert_from_hf", action="store_true", help="Hugging Face -> Megatron")
    p.add_argument("--hf_model_name_or_path", metavar="DIR_OR_ID", help="the Hugging Face folder or hub id to read")
    p.add_argument("--save", metavar="CKPT", help="the Megatron checkpoint folder to write")
    p.add_argument("--tensor_model_parallel_size", type=int, metavar="T", help="ranks that share a layer; default 1")
    p.add_argument("--pipeline_model_parallel_size", type=int, metavar="P", help="pipeline stages; default 1")
    p.add_argument(
        "--expert_model_parallel_size", type=int, metavar="E", help="ranks that share the experts; default 1"
    )
    p.add_argument(
        "--expert_tensor_parallel_size", type=int, metavar="ET", help="ranks that split each expert; default T"
    )
    p.add_argument("--convert_to_hf", action="store_true", help="Megatron -> Hugging Face")
    p.add_argument("--load", metavar="CKPT", help="the Megatron checkpoint folder to read")
    p.add_argument("--hf_save_path", metavar="OUT", help="the Hugging Face folder to write")
    p.add_argument("--adapter_only", action="store_true", help="of a LoRA checkpoint, only the adapter (a PEFT folder)")
    p.add_argument(
        "--merge", action="store_true", help="of a LoRA checkpoint, the base model with the adapter merged in"
    )
    p.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights; default: as they are")
    p.add_argument("--max_shard_size", metavar="SIZE", help="largest safetensors file, such as 5GB; default 5GB")
    p.add_argument(
        "--verify_checksums",
        choices=("true", "false"),
        default="true",
        help="read a checkpoint's files against their checksums before they are loaded; default true",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs; default cpu")
    p.add_argument("--adapter", metavar="PEFT_DIR", help="a PEFT LoRA adapter -> Megatron, for the model named")
    p.add_argument(
        "--allow_other_base",
        action="store_true",
        help="take an adapter whose adapter_config.json names another base model, or merge one into other weights than "
        "it was trained over; its shapes must fit all the same",
    )
    p.add_argument("--list", action="store_true", help="print the supported model types, one a line")
    return p


def main(argv: list[str]) -> int:
    """The command with the words after it; the exit code."""
    commands = parser()
    options = commands.parse(argv)
    if options.help:
        print(commands.format_help(), end="")
        return 0
    if options.list:
        print("\n".join(_supported()))
        return 0
    if options.framework != "megatron_bridge":
        raise ConfigError(f"unknown framework '{options.framework}'; megatron_bridge is the only one here")
    if options.adapter is not None:
        return _adapter_in(options)
    if not options.merge:
        _refuse(options, "--convert_from_hf or --convert_to_hf without --merge", ("allow_other_base",))
    if options.convert_from_hf == options.convert_to_hf:
        raise ConfigError(
            "give one direction: --convert_from_hf (Hugging Face -> Megatron) "
            "or --convert_to_hf (Megatron -> Hugging Face)"
        )
    return _from_hf(options) if options.convert_from_hf else _to_hf(options)


def _supported() -> list[str]:
    """A line a model_type: parallelism, the modules that adapters can be on, the released models."""
    from primus_bridge.conversion.families import supported_model_types

    found = supported_model_types()
    wide, wider = max(len(one.model_type) for one in found), max(len(one.layouts) for one in found)
    widest = max(len(one.models) for one in found)
    return [
        f"{one.model_type:<{wide}}  {one.models:<{widest}}  {one.layouts:<{wider}}  LoRA: {one.adapters}"
        for one in found
    ]


def _from_hf(options: argparse.Namespace) -> int:
    _need(options, "--convert_from_hf", ("hf_model_name_or_path", "save"))
    _refuse(options, "--convert_from_hf", ("load", "hf_save_path", "adapter_only", "merge", "max_shard_size"))
    keywords = {
        "hf_model_name_or_path": options.hf_model_name_or_path,
        "save": options.save,
        "layout": _layout(options),
        "dtype": options.dtype,
        "device": options.device,
    }
    return _launch("primus_bridge.conversion.convert:import_hf", keywords)


def _adapter_in(options: argparse.Namespace) -> int:
    _need(options, "--adapter", ("hf_model_name_or_path", "save"))
    others = ("convert_to_hf", "load", "hf_save_path", "adapter_only", "merge", "max_shard_size")
    _refuse(options, "--adapter", others)
    keywords = {
        "adapter": options.adapter,
        "hf_model_name_or_path": options.hf_model_name_or_path,
        "save": options.save,
        "layout": _layout(options),
        "dtype": options.dtype,
        "device": options.device,
        "allow_other_base": options.allow_other_base,
    }
    return _launch("primus_bridge.conversion.import_adapter:import_adapter", keywords)


def _to_hf(options: argparse.Namespace) -> int:
    _need(options, "--convert_to_hf", ("load", "hf_save_path"))
    _refuse(options, "--convert_to_hf", ("save",))
    if options.adapter_only and options.merge:
        raise ConfigError("--adapter_only and --merge contradict each other: keep one")
    keywords = {
        "load": options.load,
        "hf_save_path": options.hf_save_path,
        "adapter_only": options.adapter_only,
        "merge": options.merge,
        "dtype": options.dtype,
        "device": options.device,
        "max_shard_size": options.max_shard_size or "5GB",
        "hf_model_name_or_path": options.hf_model_name_or_path,
        "layout": _layout(options),
        "verify_checksums": options.verify_checksums == "true",
        "allow_other_base": options.allow_other_base,
    }
    return _launch("primus_bridge.conversion.convert:export_hf", keywords)


def _launch(entry: str, keywords: dict[str, Any]) -> int:
    """The library's function in a rank of the job that is there, or on as many ranks of ours as the layout needs."""
    from primus_bridge.config.validate import layout_size
    from primus_bridge.conversion.convert import layout_arguments
    from primus_bridge.launch.environment import join_job
    from primus_bridge.launch.joined import as_one_rank
    from primus_bridge.launch.local import call, launch

    if join_job():
        return as_one_rank(lambda: call(entry, keywords))
    return launch(entry, keywords, layout_size(layout_arguments(keywords["layout"])))


def _layout(options: argparse.Namespace) -> dict[str, int]:
    from primus_bridge.conversion.convert import LAYOUT

    for name in LAYOUT:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be above 0, got {value}")
    return {name: getattr(options, name) for name in LAYOUT if getattr(options, name) is not None}


def _need(options: argparse.Namespace, direction: str, names: tuple[str, ...]) -> None:
    missing = [f"--{name}" for name in names if not getattr(options, name)]
    if missing:
        raise ConfigError(f"{direction} needs {' and '.join(missing)}; see primus convert --help")


def _refuse(options: argparse.Namespace, direction: str, names: tuple[str, ...]) -> None:
    given = [f"--{name}" for name in names if getattr(options, name)]
    if given:
        raise ConfigError(f"{', '.join(given)} has no meaning with {direction}; see primus convert --help")


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
