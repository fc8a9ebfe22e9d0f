"""Generate cases of faults, and score a diagnosis by them.

    python tests/bench/faults/run.py [OPERATOR …] [--seeds tune|report] [--severity drawn|all|mild|medium|strong] [--jobs 2]

Cases that were made are kept below the cache folder (`data/cache/faults`), so that a run that was stopped goes on.
"""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import argparse  # noqa: E402
import multiprocessing  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

BENCH = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCH), str(BENCH.parent)]
from measured import publish  # noqa: E402

from faults.cases import GRADES, Case  # noqa: E402
from faults.operators import OPERATORS, drawn_severity, generate, shared_bench  # noqa: E402
from faults.score import COMMAND, HEAD, Score, score, summary  # noqa: E402
from netllm_lib import ARITHMETIC, config, runs  # noqa: E402

VERSION = 1  # of the cases: a new number makes all of them anew
SEEDS = {"tune": (1,), "report": (101, 102, 103)}
Wanted = tuple[str, str, int]  # operator, severity, seed


def cached_case(wanted: Wanted) -> Case:
    """A case of the cache, made if it is not there. The name of its folder does not tell what is wrong."""
    root = runs.cache_root() / "faults" / f"{ARITHMETIC}-{VERSION}"
    truth = root / "truth" / f"{'-'.join(map(str, wanted))}.json"
    if not truth.is_file():
        torch.set_num_threads(1)
        folder = root / "cases" / runs.content_hash([*wanted, VERSION])
        shutil.rmtree(folder, ignore_errors=True)
        runs.write_json(truth, generate(*wanted, folder))
    return config.parse(Case, runs.read_json(truth), str(truth))


def one(work: tuple[Wanted, str]) -> Score | str:
    """The score of a case, or why there is none."""
    wanted, diagnoser = work
    try:
        case = cached_case(wanted)
    except Exception as error:  # one operator that cannot do its work does not stop the others
        return f"{' '.join(map(str, wanted))}: not made, {type(error).__name__}: {error}"
    return score(diagnoser, case)


def scored(wanted: list[Wanted], diagnoser: str, jobs: int) -> Iterator[Score | str]:
    work = [(each, diagnoser) for each in wanted]
    if jobs < 2:
        yield from map(one, work)
    else:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            yield from pool.imap(one, work)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="parts of names of operators [all]")
    parser.add_argument("--seeds", choices=SEEDS, default="tune")
    parser.add_argument("--severity", choices=("drawn", "all", *GRADES), default="drawn")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--diagnoser", default=COMMAND, help=f"a command that ends with a line of JSON [{COMMAND}]")
    parser.add_argument("--publish", action="store_true", help="write reports/benchmarks/faults.md")
    asked = parser.parse_args(arguments)
    shared_bench()  # its data are written once, before there are several processes
    names = dict.fromkeys(name for part in asked.operators or [""] for name in OPERATORS if part in name)
    if asked.seeds == "report":
        print("reporting seeds: whoever tunes on what comes now has spoilt them", file=sys.stderr)
    seeds, graded = SEEDS[asked.seeds], {"drawn": (), "all": GRADES}.get(asked.severity, (asked.severity,))
    wanted = [(o, g, seed) for o in names for seed in seeds for g in graded or (drawn_severity(o, seed),)]
    scores, not_made = [], []
    print(HEAD)
    for found in scored(wanted, asked.diagnoser, asked.jobs):
        if isinstance(found, str):
            not_made.append(found)
            print(found, file=sys.stderr, flush=True)
        else:
            scores.append(found)
            print(found.row(), flush=True)
    print(f"\n{summary(scores)}", *not_made, sep="\n")
    if asked.publish:
        about = f"`{asked.diagnoser}`, seeds {', '.join(map(str, seeds))}, severity {asked.severity}."
        rows = "\n".join([HEAD, *(score.row() for score in scores)])
        publish("faults", f"# Diagnosis: generated faults\n\n{about}\n\n{summary(scores)}\n\n{rows}")
    return 1 if not_made or any(s.wrong for s in scores) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
