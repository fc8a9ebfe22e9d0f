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
from netllm_lib.abr.diagnosis import Diagnosis  # noqa: E402
from netllm_lib.findings import Effect  # noqa: E402
from netllm_lib.runs import PROJECT, atomic_path  # noqa: E402
from planted import FAULTS, Fault, Planted, examine  # noqa: E402
from planted_runs import Bench  # noqa: E402

REPORT = PROJECT / "reports" / "benchmarks" / "diagnosis.md"


def estimate(fault: Fault, diagnosis: Diagnosis) -> Effect | None:
    """The effect that the diagnosis measured for the planted fault."""
    return next((f.effect for f in diagnosis.findings if f.id in fault.expected and f.effect is not None), None)


def numbers(fault: Fault, planted: Planted, diagnosis: Diagnosis) -> tuple[str, str]:
    """(estimated, true) effect as text."""
    measured, true = estimate(fault, diagnosis), planted.true_effect
    shown = "" if measured is None else f"{measured.mean:+.3f} [{measured.low:+.3f}, {measured.high:+.3f}]"
    return shown, "" if true is None else f"{true:+.3f}"


def row(fault: Fault, planted: Planted, diagnosis: Diagnosis, wrong: str) -> str:
    first = diagnosis.first
    if fault.harmless:
        found = ", ".join(f"{f.id} ({f.severity})" for f in diagnosis.findings if f.id in fault.expected)
        found = found or ("no cause" if not diagnosis.causes else ", ".join(f.id for f in diagnosis.causes))
    else:
        found = "nothing" if first is None else f"{first.id} ({first.severity})"
    return " | ".join(
        ["", fault.name, fault.what, found, "**wrong**" if wrong else "right", *numbers(fault, planted, diagnosis), ""]
    ).strip()


def main(parts: list[str]) -> int:
    torch.set_num_threads(1)
    chosen = [fault for fault in FAULTS if not parts or any(part in fault.name for part in parts)]
    start, clock = time.process_time(), time.perf_counter()
    bench = Bench()
    rows: dict[bool, list[str]] = {False: [], True: []}
    mistakes, inside, measured = [], 0, 0
    for fault in chosen:
        with tempfile.TemporaryDirectory() as folder:
            try:
                planted, diagnosis = examine(bench, fault, Path(folder))
            except Exception as error:  # a diagnosis that fails is a wrong one; the others still count
                mistakes.append(f"{fault.name}: {type(error).__name__}: {error}")
                print(f"{fault.name}: {error!r}", flush=True)
                continue
        wrong = fault.judge(diagnosis)
        if wrong:
            mistakes.append(f"{fault.name}: {wrong}")
        effect = estimate(fault, diagnosis)
        if effect is not None and planted.true_effect is not None:
            measured += 1
            inside += effect.low <= planted.true_effect <= effect.high
        rows[fault.harmless].append(row(fault, planted, diagnosis, wrong))
        print(rows[fault.harmless][-1], flush=True)
    faulty, healthy = (sum(f.harmless == harmless for f in chosen) for harmless in (False, True))
    took = f"{time.process_time() - start:.0f} s of CPU time, {time.perf_counter() - clock:.0f} s in all, on one thread"
    took += ", trainings from the cache." if bench.reused else ", trainings included."
    text = f"""# Diagnosis: planted faults

`python tests/bench/bench_diagnosis.py` plants each of these faults in a run of a small policy (a two-layer random llama that passes
MPC as published when it is healthy), diagnoses what lies on the disk, and compares the first finding with the fault. Traces
and video are synthetic; 40 test traces. {took}

{len(chosen) - len(mistakes)} of {len(chosen)} are right: {faulty} faults, and {healthy} runs that are healthy or whose
mistakes cost nothing.

*Estimated*: what the diagnosis says that the fix brings in mean reward, with its 95 % interval, where it measured that (by
replaying the run with the switch turned, or by training anew with the sound defaults). *True*: mean reward of the healthy twin
less the run's, on the same traces. The true effect lies in the interval of {inside} of {measured} estimates.

| fault | what was done | first finding | | estimated | true |
|---|---|---|---|---|---|
{chr(10).join(rows[False])}

Runs in which no finding may be a cause; what has to be mentioned is shown.

| run | what was done | mentioned | | estimated | true |
|---|---|---|---|---|---|
{chr(10).join(rows[True])}
"""
    if not parts:
        with atomic_path(REPORT) as aside:
            aside.write_text(text)
        print(f"written: {REPORT}")
    print(f"{len(chosen) - len(mistakes)} of {len(chosen)} right, {time.process_time() - start:.0f} s of CPU time")
    for mistake in mistakes:
        print(f"wrong: {mistake}")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
