"""primus train pretrain|posttrain --config FILE [overrides]"""


def run(args, overrides):
    from primus.core.runtime.train_runtime import PrimusRuntime

    module = {"pretrain": "pre_trainer", "posttrain": "post_trainer"}[args.suite]
    PrimusRuntime().run_train_module(args.config, module, overrides)


def register_subcommand(subparsers):
    parser = subparsers.add_parser("train")
    suites = parser.add_subparsers(dest="suite", required=True)
    for name in ("pretrain", "posttrain"):
        suites.add_parser(name).add_argument("--config", "--exp", dest="config", required=True)
    parser.set_defaults(func=run)
