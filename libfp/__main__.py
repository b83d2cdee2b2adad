"""The `fp` command, also as `python -m libfp`. Ctrl-C is no traceback either while modules are still being loaded."""

import sys


def main() -> int:
    """See `libfp.cli.main`."""
    try:
        from libfp.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("fp: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
