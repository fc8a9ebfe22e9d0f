"""The diagnosis on runs with a planted fault: first finding against the fault, estimated against true effect.

Trains and plays everything itself, in about ten minutes on one thread (less when the trainings are in the cache). Writes
reports/benchmarks/diagnosis.md if all faults were planted.

    python tests/bench/bench_diagnosis.py [PART OF A NAME …]
"""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measured import publish  # noqa: E402

from planted import Fault, examine  # noqa: E402
from planted_list import FAULTS  # noqa: E402
from planted_runs import Bench  # noqa: E402


def case(bench: Bench, fault: Fault) -> tuple[str, str, bool | None]:
    """(what is wrong with the diagnosis, its row of the report, whether the true effect lies in the estimated interval)."""
    with tempfile.TemporaryDirectory() as folder:
        planted, diagnosis = examine(bench, fault, Path(folder))
    wrong = fault.judge(diagnosis)
    ours = [f for f in diagnosis.findings if f.id in fault.expected]
    shown = (ours or diagnosis.causes) if fault.harmless else diagnosis.findings[:1]
    found = ", ".join(f"{f.id} ({f.severity})" for f in shown) or "nothing"
    true, effect = planted.true_effect, next((f.effect for f in ours if f.effect is not None), None)
    inside = None if effect is None or true is None else effect.low <= true <= effect.high
    estimated = "" if effect is None else f"{effect.mean:+.3f} [{effect.low:+.3f}, {effect.high:+.3f}]"
    cells = [
        fault.name,
        fault.what,
        found,
        "**wrong**" if wrong else "right",
        estimated,
        "" if true is None else f"{true:+.3f}",
    ]
    return wrong, f"| {' | '.join(cells)} |", inside


def main(parts: list[str]) -> int:
    torch.set_num_threads(1)
    chosen = [fault for fault in FAULTS if not parts or any(part in fault.name for part in parts)]
    start, clock = time.process_time(), time.perf_counter()
    bench = Bench()
    rows: dict[bool, list[str]] = {False: [], True: []}
    mistakes, inside = [], []
    for fault in chosen:
        try:
            wrong, row, within = case(bench, fault)
        except Exception as error:  # a diagnosis that fails is a wrong one; the others still count
            wrong, row, within = f"{type(error).__name__}: {error}", f"| {fault.name} | {fault.what} | failed |", None
        rows[fault.harmless].append(row)
        inside += [] if within is None else [within]
        mistakes += [f"{fault.name}: {wrong}"] if wrong else []
        print(row, flush=True)
    took = f"{time.process_time() - start:.0f} s of CPU time, {time.perf_counter() - clock:.0f} s in all, on one thread"
    took += ", trainings from the cache." if bench.reused else ", trainings included."
    head = "| | what was done | {} | | estimated | true |\n|---|---|---|---|---|---|\n"
    text = f"""# Diagnosis: planted faults

`python tests/bench/bench_diagnosis.py` plants each of these faults in a run of a small policy (a two-layer random llama that passes
MPC as published when it is healthy), diagnoses what lies on the disk, and compares the first finding with the fault. Traces
and video are synthetic; 40 test traces. {took}

{len(chosen) - len(mistakes)} of {len(chosen)} are right: {len(rows[False])} faults, and {len(rows[True])} runs that are healthy
or whose mistakes cost nothing.

*Estimated*: what the diagnosis says that the fix brings in mean reward, with its 95 % interval, where it measured that (by
replaying the run with the switch turned, or by training anew with the sound defaults). *True*: mean reward of the healthy twin
less the run's, on the same traces. The true effect lies in the interval of {sum(inside)} of {len(inside)} estimates.

{head.format("first finding")}{chr(10).join(rows[False])}

Runs in which no finding may be a cause; what has to be mentioned is shown.

{head.format("mentioned")}{chr(10).join(rows[True])}
"""
    if not parts:
        publish("diagnosis", text)
    print(
        f"{len(chosen) - len(mistakes)} of {len(chosen)} right",
        *(f"wrong: {mistake}" for mistake in mistakes),
        sep="\n",
    )
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
