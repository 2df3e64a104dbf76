"""Training speed and memory on a CPU: saro_jax, TRL and google-tunix on the same rows, in one run.

    python benchmarks/train_cpu.py --trl-python=... --tunix-python=... --tune   # once a machine
    python benchmarks/train_cpu.py --trl-python=... --tunix-python=...

Every contestant trains in a process of its own, one after the other, in alternating order, and sees
the same texts through the same chat template, in the same order, with the same batches:

rw       one example a row: question -> answer with reasoning, as the file has it
process  one pair a row: both answers begin with the first half of the row's reasoning; chosen goes
         on as the row does, rejected as the next row does from the middle of its reasoning
outcome  one pair a row that shares the prompt alone: chosen is the row's whole response, rejected
         that of the row whose response is the next longer one in the file

The warm-up's batches are all the rows there are; the timed steps repeat them in order, so that
every program a contestant needs is compiled before, and repeats measure the same work.

tokens/s  prompt and answer tokens of every sequence (of both branches of a pair), padding not
          counted, over the wall time of a step; the median of the steps after the warm-up. The last
          step is left out: it has no next one that a trainer could overlap it with. Loading,
          compiling, and scoring the reference are not in it; "whole run" has them.
peak RSS  the most memory the process ever held, from the kernel (`wait4`)

--tune tries the settings of SETTINGS one after another, then the memory allocators with the best of
them, and keeps the fastest of each contestant in tuned.json, which later runs in the same --out
read; what was tuned in one dtype alone runs with that in both, what was not tuned with the first of
each list. Every finished process is kept under
results/: the same command continues where it was stopped.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import harness
from harness import ROOT
from star_rows import KINDS, Rows, prepare

PEERS = Path(__file__).with_name("peers.py")
TITLES = {"rw": "RW (SFT)", "process": "SRPO, process pairs", "outcome": "SRPO, outcome pairs"}
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # transparent huge pages: what `make quickstart` sets
# GLIBC_TUNABLES. keep-pages: all from the heap, never given back to the kernel.
ALLOCATORS = {
    "keep-pages": ":".join(
        (
            HUGE_PAGES,
            "glibc.malloc.mmap_max=0",
            f"glibc.malloc.trim_threshold={2**40}",
            f"glibc.malloc.top_pad={2**28}",
        )
    ),
    "hugetlb": HUGE_PAGES,
    "default": "",
}
# What --tune tries; the first is taken untuned. saro_jax's are settings of its config; `micro` is
# the rows of a pass, the rest of the batch is accumulated.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "saro_jax": {
        "recipe": {},
        "micro_rows=2": {"train.micro_rows": 2},
        "row_buckets=8": {"data.row_buckets": 8},
        "remat=dots": {"model.remat": "dots"},
    },
    "TRL": {
        "whole batch": {},
        "whole batch, no checkpointing": {"gradient_checkpointing": False},
        "1 row a pass": {"micro": 1},
        "1 row a pass, no checkpointing": {"micro": 1, "gradient_checkpointing": False},
        "padding_free": {"padding_free": True},
    },
    "Tunix": {
        "1 row a pass, no remat": {"micro": 1, "remat": "NONE"},
        "1 row a pass": {"micro": 1, "remat": "DECODER"},
        "whole batch": {"remat": "DECODER"},
    },
}
# Largest difference of the first step's loss between contestants, by stage and dtype: it shows that
# they train the same model on the same tokens. SRPO starts at ln 2.
LOSS_TOLERANCE = 0.05
TUNE_STEPS = 4  # two batches, each of them twice; step 3 is timed


class Choice(NamedTuple):
    """How a contestant runs: a key of its SETTINGS and one of ALLOCATORS."""

    contestant: str
    setting: str
    allocator: str


class Run(NamedTuple):
    """What one process measured of itself, and the kernel of it."""

    kind: str
    dtype: str
    choice: Choice
    tokens: list[int]  # of every step
    seconds: list[float]  # of every step
    loss: list[float]
    tokens_per_second: float
    peak_rss_gb: float  # 1e9 bytes
    whole_run_s: float
    load_before: float  # 1-minute load average: other work on the machine
    refused: str = ""  # why the contestant does not run with this setting


def main() -> int:
    args = arguments()
    try:
        compare(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    rows = ROOT.parent / "shared" / "data" / "star1.jsonl"
    add("--rows", type=Path, default=rows, help="JSON lines with question and response")
    add("--model", default="quickstart", help="Hub id, folder, .gguf file or quickstart")
    add("--python", default=sys.executable, help="interpreter that has jax, for saro_jax")
    add("--trl-python", help="interpreter that has trl and torch; left out without")
    add("--tunix-python", help="interpreter that has google-tunix; left out without")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    add("--rounds", type=int, default=1, help="times every contestant runs; the median counts")
    add("--steps", type=int, default=5, help="optimizer steps of a run")
    add(
        "--warmup", type=int, default=2, help="first steps, not timed; later ones repeat their rows"
    )
    add("--batch", type=int, default=4, help="examples or pairs of a step")
    add("--max-length", type=int, default=512, help="tokens of one sequence")
    default = ROOT / "runs" / "benchmarks" / "train_cpu"
    add("--out", type=lambda text: Path(text).absolute(), default=default)
    add(
        "--tune",
        nargs="*",
        choices=SETTINGS,
        metavar="TRAINER",
        help="find the best settings of these trainers, all by default, under --allocator where it "
        "is given; then stop",
    )
    add("--allocator", choices=ALLOCATORS, help="this one for all, whatever tuned.json has")
    add("--default-malloc", action="store_true", help="each also with the default allocator")
    add("--no-ceilings", action="store_true", help="leave out copies, products and decoding")
    add(
        "--saro",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="a further setting of saro_jax's config, such as train.micro_rows=2; may be repeated",
    )
    return parser.parse_args(argv)


def compare(args: argparse.Namespace) -> None:
    """Run everything that is not there yet; write train_cpu.md and .json into `args.out`."""
    if args.steps < args.warmup + 2:
        raise ValueError(f"--steps={args.steps}: at least --warmup + 2 = {args.warmup + 2} steps")
    contestants = {"saro_jax": args.python, "TRL": args.trl_python, "Tunix": args.tunix_python}
    contestants = {name: python for name, python in contestants.items() if python}
    versions = harness.versions()
    for name in contestants:
        if name != "saro_jax":
            versions |= peer_versions(name, contestants[name])
    claim(args, versions)
    files, model, prepared = prepare(
        args.rows, args.model, args.warmup * args.batch, args.max_length, args.out
    )
    print(f"{harness.cpu()}; {prepared}", flush=True)
    jobs = Jobs(args, contestants, files, model)
    if args.tune is not None:
        tune(args, jobs)
        return
    chosen = {dtype: choices(args, contestants, dtype) for dtype in args.dtypes}
    ceilings = {} if args.no_ceilings else measure_ceilings(args, contestants)
    runs: list[Run] = []
    for k in range(args.rounds):
        for kind in args.kinds:
            for dtype in args.dtypes:
                # Forth and back, so that a drift of the machine's speed falls on all alike.
                order = chosen[dtype][KINDS[kind]]
                for choice in order if k % 2 == 0 else order[::-1]:
                    runs.append(jobs.run(kind, dtype, choice, f"round{k + 1}", args.steps))
                    check_same_work(runs, args.batch)
                    report(args, runs, versions, prepared, ceilings)
    print((args.out / "train_cpu.md").read_text(), end="")


def claim(args: argparse.Namespace, versions: dict[str, str]) -> None:
    """Take `args.out` for these arguments; results of others do not belong in one table."""
    same = ("rows", "model", "warmup", "batch", "max_length", "steps", "saro")
    wanted = {key: str(getattr(args, key)) for key in same} | versions
    file = args.out / "arguments.json"
    if file.exists():
        before = json.loads(file.read_text())
        for key in before.keys() & wanted.keys():
            if before[key] != wanted[key]:
                raise ValueError(
                    f"{args.out}: holds results of {key}={before[key]}, now {wanted[key]}; "
                    "give another --out or remove it"
                )
        wanted = before | wanted
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=2) + "\n")


# ---- processes -----------------------------------------------------------------------------------


class Jobs(NamedTuple):
    """What every process is started from."""

    args: argparse.Namespace
    contestants: dict[str, str]  # name -> interpreter
    files: dict[str, Rows]
    model: Path

    def run(self, kind: str, dtype: str, choice: Choice, purpose: str, steps: int) -> Run:
        """One process of one contestant; read from results/ where it has run before."""
        name = "-".join((purpose, kind, dtype, *choice))
        name = "".join(c if c.isalnum() or c in "-_=." else "_" for c in name)
        file = self.args.out / "results" / f"{name}.json"
        if file.exists():
            found = json.loads(file.read_text())
            done = Run(**found | {"choice": Choice(*found["choice"])})
        else:
            done = self._start(kind, dtype, choice, steps, file.with_suffix(".log"))
            partial = file.with_suffix(".part")
            partial.write_text(json.dumps(done._asdict()) + "\n")
            os.replace(partial, file)
        said = done.refused or (
            f"{done.tokens_per_second:6.0f} tokens/s{done.peak_rss_gb:7.2f} GB  whole run "
            f"{done.whole_run_s:.0f} s, load before {done.load_before:.1f}"
        )
        print(f"{purpose:8}{kind:9}{dtype:10}{' | '.join(choice):58}{said}", flush=True)
        return done

    def _start(self, kind: str, dtype: str, choice: Choice, steps: int, log: Path) -> Run:
        args, options = self.args, SETTINGS[choice.contestant][choice.setting]
        log.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            python = self.contestants[choice.contestant]
            if choice.contestant == "saro_jax":
                settings = saro_settings(args, dtype, self.files[kind], self.model, steps, options)
                settings["srpo.reference_cache"] = out.parent / "reference"
                command = [python, "-m", "saro_jax.train", f"--stage={KINDS[kind]}"]
                command += ["--config=quickstart", f"--out={out}"]
                command += [f"--{key}={value}" for key, value in settings.items()]
            else:
                job = {"peer": choice.contestant.lower(), "stage": KINDS[kind], "dtype": dtype}
                job |= {"rows": str(self.files[kind].texts), "steps": steps, "options": options}
                job |= {"tokens": str(self.files[kind].tokens), "model": str(self.model)}
                job |= {"out": str(out), "batch": args.batch, "max_length": args.max_length}
                described = Path(folder) / "job.json"
                described.write_text(json.dumps(job))
                command = [python, str(PEERS), "train", str(described)]
            environment = os.environ | {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_CACHE": str(Path(folder) / "datasets"),
                "TOKENIZERS_PARALLELISM": "false",
            }
            environment.pop("GLIBC_TUNABLES", None)
            if ALLOCATORS[choice.allocator]:
                environment["GLIBC_TUNABLES"] = ALLOCATORS[choice.allocator]
            load, started = os.getloadavg()[0], time.monotonic()
            with log.open("w") as stream:
                process = subprocess.Popen(
                    command, env=environment, stdout=stream, stderr=subprocess.STDOUT, cwd=folder
                )
                # Not process.wait: the kernel tells the peak memory only to who collects it.
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            whole = time.monotonic() - started
            if process.returncode:
                last = (log.read_text().strip().splitlines() or ["no output"])[-1]
                raise ValueError(
                    f"{choice.contestant}, {kind}, {dtype}, {choice.setting}: ended with "
                    f"{process.returncode}, see {log}: {last}"
                )
            found = read_saro(out) if choice.contestant == "saro_jax" else read_peer(out)
        peak, refused = usage.ru_maxrss * 1024 / 1e9, found.pop("refused", "")
        if refused:
            return Run(kind, dtype, choice, [], [], [], 0.0, peak, whole, load, refused)
        speeds = [n / s for n, s in zip(found["tokens"], found["seconds"], strict=True)]
        speed = statistics.median(speeds[args.warmup : steps - 1])
        return Run(
            kind,
            dtype,
            choice,
            **found,
            tokens_per_second=speed,
            peak_rss_gb=peak,
            whole_run_s=whole,
            load_before=load,
        )


def saro_settings(
    args: argparse.Namespace,
    dtype: str,
    rows: Rows,
    model: Path,
    steps: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What a user would type, with everything that a default might change spelt out."""
    return {
        "model.path": model,
        "model.dtype": dtype,
        "data.train": rows.texts,
        "data.max_length": args.max_length,
        "data.shuffle": "false",
        "data.max_reject_share": 0,
        "train.steps": steps,
        "train.batch_rows": args.batch,
        "train.log_every": 1,
        "optimizer.learning_rate": 1e-6,
        **options,
        **dict(setting.split("=", 1) for setting in args.saro),
    }


def read_saro(out: Path) -> dict[str, Any]:
    """Tokens, seconds and loss of every step, from the run's own metrics."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    total = [0, *(line["num_tokens"] for line in lines)]
    tokens = [after - before for before, after in pairwise(total)]
    seconds = [n / line["tokens_per_second"] for n, line in zip(tokens, lines, strict=True)]
    return {"tokens": tokens, "seconds": seconds, "loss": [line["loss"] for line in lines]}


def read_peer(out: Path) -> dict[str, Any]:
    return json.loads((out / "steps.json").read_text())


def check_same_work(runs: list[Run], batch: int) -> None:
    """The trainers count their tokens themselves; counts and first losses must agree.

    A template's newline after the last turn, which saro_jax leaves out, is the one token a sequence
    that is allowed.
    """
    last = runs[-1]
    first = next(run for run in runs if (run.kind, run.dtype) == (last.kind, last.dtype))
    a, b = sum(first.tokens), sum(last.tokens)
    names = (
        f"{last.kind}, {last.dtype}: {first.choice.contestant} {{}}, {last.choice.contestant} {{}}"
    )
    if last.refused:
        raise ValueError(f"{names.format('runs', last.refused)}; tune again")
    if abs(a - b) > len(last.tokens) * batch * (1 if KINDS[last.kind] == "rw" else 2):
        raise ValueError(f"{names.format(a, b)} tokens: not the same rows")
    a, b = first.loss[0], last.loss[0]
    if not abs(a - b) <= LOSS_TOLERANCE:
        raise ValueError(f"{names.format(a, b)} first loss: not the same model or tokens")


# ---- settings ------------------------------------------------------------------------------------


def tune(args: argparse.Namespace, jobs: Jobs) -> None:
    """Find the fastest setting, then allocator, of each contestant, stage and dtype: tuned.json.

    Pairs are tuned on the first kind of them in --kinds; the other one takes the same.
    """
    file = args.out / "tuned.json"
    tuned = json.loads(file.read_text()) if file.exists() else {}
    stages = {KINDS[kind]: kind for kind in reversed(args.kinds)}
    steps = max(TUNE_STEPS, args.warmup + 2)
    for dtype in args.dtypes:
        for stage, kind in stages.items():
            for name in args.tune or jobs.contestants:
                best: tuple[float, Choice] | None = None

                def attempt(choice, best=None, kind=kind, dtype=dtype):
                    try:
                        done = jobs.run(kind, dtype, choice, "tune", steps)
                    except ValueError as error:  # out of memory, most often
                        print(f"tune    {error}", flush=True)
                        return best
                    found = done.tokens_per_second, choice
                    return max(filter(None, (best, found)), key=lambda pair: pair[0])

                first, *others = [args.allocator] if args.allocator else ALLOCATORS
                for setting in SETTINGS[name]:
                    best = attempt(Choice(name, setting, first), best)
                if best is None:
                    raise ValueError(f"{name}, {kind}, {dtype}: no setting works")
                for allocator in others:
                    best = attempt(Choice(name, best[1].setting, allocator), best)
                tuned[f"{name} {stage} {dtype}"] = list(best[1])
                file.write_text(json.dumps(tuned, indent=2) + "\n")
    print(file.read_text(), end="")


def choices(
    args: argparse.Namespace, contestants: dict[str, str], dtype: str
) -> dict[str, list[Choice]]:
    """How the contestants run, by stage: as tuned.json has it, else the first of each list.

    What was tuned in one dtype alone runs with that in the other.
    """
    file = args.out / "tuned.json"
    tuned = json.loads(file.read_text()) if file.exists() else {}
    found: dict[str, list[Choice]] = {}
    for stage in set(KINDS.values()):
        found[stage] = []
        for name in contestants:
            plain = [name, next(iter(SETTINGS[name])), next(iter(ALLOCATORS))]
            keys = [f"{name} {stage} {one}" for one in (dtype, "bfloat16", "float32")]
            choice = Choice(*next((tuned[key] for key in keys if key in tuned), plain))
            if args.allocator:
                choice = choice._replace(allocator=args.allocator)
            found[stage].append(choice)
            if args.default_malloc and choice.allocator != "default":
                found[stage].append(choice._replace(allocator="default"))
    return found


# ---- report --------------------------------------------------------------------------------------


def measure_ceilings(args: argparse.Namespace, contestants: dict[str, str]) -> dict[str, float]:
    """harness.ceilings and torch's products, each in a process of its own; kept in results/."""
    file = args.out / "results" / "ceilings.json"
    if not file.exists():
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        environment["GLIBC_TUNABLES"] = HUGE_PAGES
        commands = [[args.python, str(Path(harness.__file__))]]
        if "TRL" in contestants:
            commands.append([contestants["TRL"], str(PEERS), "matmul"])
        found: dict[str, float] = {}
        for command in commands:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"ceilings: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            found |= json.loads(done.stdout.splitlines()[-1])
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found) + "\n")
    return json.loads(file.read_text())


def report(
    args: argparse.Namespace,
    runs: list[Run],
    versions: dict[str, str],
    prepared: str,
    ceilings: dict[str, float],
) -> None:
    """Write the table and all measurements so far."""
    head = ["rows", "dtype", "trainer", "setting", "allocator", "tokens/s", "best"]
    head += ["peak RSS GB", "whole run s", "x TRL", "x Tunix", "RSS / TRL"]
    groups: dict[tuple[str, str, Choice], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.kind, run.dtype, run.choice), []).append(run)

    def speed(some: list[Run]) -> float:
        return statistics.median(run.tokens_per_second for run in some)

    def memory(some: list[Run]) -> float:
        return max(run.peak_rss_gb for run in some)

    rows = []
    for (kind, dtype, choice), some in groups.items():
        # A peer's own best, whichever allocator that is.
        peers = {
            name: max(
                (
                    s
                    for (k, d, c), s in groups.items()
                    if (k, d, c.contestant) == (kind, dtype, name)
                ),
                key=speed,
                default=None,
            )
            for name in ("TRL", "Tunix")
        }
        trl, tunix = peers["TRL"], peers["Tunix"]
        rows.append(
            [
                *(TITLES[kind], dtype, *choice, speed(some)),
                max(run.tokens_per_second for run in some),
                memory(some),
                statistics.median(run.whole_run_s for run in some),
                f"{speed(some) / speed(trl):.2f}" if trl else "",
                f"{speed(some) / speed(tunix):.2f}" if tunix else "",
                f"{memory(some) / memory(trl):.2f}" if trl else "",
            ]
        )
    loads = [run.load_before for run in runs]
    text = f"{harness.cpu()}, {harness.memory_gb():.0f} GB. {harness.named(versions)}.\n"
    text += (
        f"{args.model}, {prepared}; batch {args.batch}, max {args.max_length} tokens; median of "
    )
    text += (
        f"steps {args.warmup + 1} to {args.steps - 1} of {args.steps}, of {args.rounds} rounds. "
    )
    text += f"Load before a process: {min(loads):.1f} to {max(loads):.1f}.\n\n"
    text += harness.table(head, rows)
    if ceilings:
        cells = [[name, value] for name, value in ceilings.items()]
        text += f"\n\n{harness.table(['ceiling', 'of this machine'], cells)}"
    refused = {
        (run["choice"][0], run["choice"][1], run["refused"])
        for file in sorted((args.out / "results").glob("tune-*.json"))
        if (run := json.loads(file.read_text()))["refused"]
    }
    for name, setting, why in sorted(refused):
        text += f"\n\n{name} does not run with {setting}: {why}."
    record = {
        "cpu": harness.cpu(),
        "versions": versions,
        "settings": {key: str(value) for key, value in vars(args).items()},
        "allocators": ALLOCATORS,
        "ceilings": ceilings,
        "runs": [run._asdict() for run in runs],
    }
    harness.write(args.out, "train_cpu", text, record)


def peer_versions(name: str, python: str) -> dict[str, str]:
    """Versions of a peer's packages; ValueError says what to install."""
    peer = name.lower()
    packages = {"trl": "'trl==1.16.*' 'torch==2.13.0'", "tunix": "google-tunix==0.1.7 jax==0.10.2"}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            [python, str(PEERS), "versions", peer], env=environment, capture_output=True, text=True
        )
    except OSError as error:
        raise ValueError(f"--{peer}-python={python}: {error.strerror}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(
            f"--{peer}-python={python}: {reason}; in an environment of its own, pip install "
            f"{packages[peer]}, or leave the option out"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return found if peer == "trl" else {k: v for k, v in found.items() if k == "google-tunix"}


if __name__ == "__main__":
    sys.exit(main())
