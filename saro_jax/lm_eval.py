"""lm-evaluation-harness on this engine: `python -m saro_jax.lm_eval --model_args pretrained=MODEL
--tasks TASKS [flags of lm_eval]`.

The command line is that of `lm_eval` with the model class `saro_jax` registered, which is also the
default of `--model`. Needs the extra: pip install 'saro_jax[lm-eval]'.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        import lm_eval.__main__ as cli  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        print(f"{error}; this needs: pip install 'saro_jax[lm-eval]'", file=sys.stderr)
        return 2
    from saro_jax.evaluation import harness  # noqa: F401, it registers the model class

    names = {flag.split("=")[0] for flag in given}
    if "--model_args" in names and not names & {"--model", "-M"}:
        given += ["--model", "saro_jax"]
    before, sys.argv = sys.argv, ["lm_eval", *given]
    try:
        cli.cli_evaluate()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
