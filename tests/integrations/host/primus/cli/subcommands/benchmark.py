"""A command of Primus alone."""


def register_subcommand(subparsers):
    parser = subparsers.add_parser("benchmark")
    parser.add_argument("suite")
    parser.set_defaults(func=lambda args, _: print(f"Primus's benchmark {args.suite}, debug {args.debug}"))
