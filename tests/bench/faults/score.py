"""Judge a diagnoser: a command that ends with a line of JSON (`netllm diagnose --json`), or a function that returns its content."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from faults.cases import Case, accepted
from netllm_lib.runs import PROJECT

COMMAND = "netllm diagnose {folder} {options} --budget 60 --json"
SLACK = 1.2  # of the budget
Diagnoser = str | Callable[[Case], dict[str, Any]]
HEAD = "| case | kind | true effect | first finding | | its interval | took |\n|---|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Score:
    """What an answer to a case is worth."""

    case: Case
    first: str  # id and severity of the first finding
    wrong: str  # empty if the answer is right
    inside: bool | None  # the interval of a true finding's effect holds the true effect; None: not measured
    candidates: tuple[tuple[float, bool], ...]  # probability, and whether it is true
    seconds: float
    late: bool  # it took more than 1.2 times its budget

    def row(self) -> str:
        """A line of a Markdown table."""
        effect = self.case.effect
        true = "" if effect is None else f"{effect.mean:+.3f} [{effect.low:+.3f}, {effect.high:+.3f}]"
        interval = {None: "", True: "holds it", False: "**does not**"}[self.inside]
        answer = f"**wrong**: {self.wrong}" if self.wrong else "right"
        return f"| {self.case.name} | {self.case.kind} | {true} | {self.first} | {answer} | {interval} | {self.seconds:.0f} s |"


def ask(diagnoser: Diagnoser, case: Case) -> tuple[dict[str, Any], float]:
    """The diagnoser's answer to a case and the seconds that it took; of a command that fails, {"error": …}.

    In a command, {folder} are the case's folders and {options} its options, such as --data and --plm; "netllm" is this one.
    """
    start = time.perf_counter()
    if not isinstance(diagnoser, str):
        return diagnoser(case), time.perf_counter() - start
    options = [word for key, value in case.options.items() for word in (f"--{key}", value)]
    words = shlex.split(diagnoser.format(folder=shlex.join(map(str, case.folders)), options=shlex.join(options)))
    if words[0] == "netllm":
        words[:1] = [sys.executable, "-c", "from netllm_lib.cli import main; main()"]
    with tempfile.TemporaryDirectory() as reports:
        env = os.environ | {"NETLLM_REPORTS": reports, "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    said, errors = done.stdout.splitlines(), done.stderr.strip().splitlines()
    failed = bool(done.returncode) or not said or not said[-1].startswith("{")
    answer = {"error": (errors or ["no JSON in its last line"])[-1]} if failed else json.loads(said[-1])
    return answer, time.perf_counter() - start


def score(diagnoser: Diagnoser, case: Case) -> Score:
    """Ask, and judge the answer. A command may take the seconds that it names as --budget and --retrain."""
    answer, seconds = ask(diagnoser, case)
    allowed = re.findall(r"--(?:budget|retrain)[ =](\d+(?:\.\d+)?)", diagnoser) if isinstance(diagnoser, str) else []
    return judge(case, answer, seconds, sum(map(float, allowed)))


def judge(case: Case, answer: dict[str, Any], seconds: float = 0.0, budget_s: float = 0.0) -> Score:
    """See `Case.kind` for what is right. Without a budget nothing is late."""
    findings, true = answer.get("findings", []), accepted(case.truth)
    first = findings[0] if findings else {"id": "nothing", "severity": "note"}
    causes = [finding["id"] for finding in findings if finding["severity"] == "cause"]
    false, wrong = [id for id in causes if case.kind == "harmless" or id not in true], ""
    if "error" in answer:
        wrong = f"failed, {answer['error']}"
    elif case.kind in ("harmless", "open"):
        wrong = f"{', '.join(false)} as cause" if false else ""
    elif first["id"] not in true:
        wrong = f"it is {case.truth[0]}"
    elif case.kind == "harmful" and first["severity"] == "note":
        wrong = "a mere note"
    effect = next((f["effect"] for f in findings if f["id"] in true and f.get("effect")), None)
    inside = effect["low"] <= case.effect.mean <= effect["high"] if effect and case.effect else None
    candidates = tuple((float(one["probability"]), one["id"] in true) for one in answer.get("candidates") or [])
    late = 0 < budget_s * SLACK < seconds
    return Score(case, f"{first['id']} ({first['severity']})", wrong, inside, candidates, seconds, late)


def summary(scores: Sequence[Score]) -> str:
    """Counts, and the reliability of the candidates' probabilities, as Markdown."""
    faults = [s for s in scores if s.case.kind in ("harmful", "measured")]
    others, inside = [s for s in scores if s not in faults], [s.inside for s in scores if s.inside is not None]
    candidates = [one for s in scores for one in s.candidates]
    lines = [
        f"- first finding true: {sum(not s.wrong for s in faults)} of {len(faults)} faults",
        f"- false causes: {sum(bool(s.wrong) for s in others)} of {len(others)} healthy, harmless or undecided runs",
        f"- true effect in the estimated interval: {sum(inside)} of {len(inside)}",
        f"- beyond {SLACK} times the budget: {sum(s.late for s in scores)} of {len(scores)}",
    ]
    if candidates:
        brier = sum((p - hit) ** 2 for p, hit in candidates) / len(candidates)
        lines += [
            f"- candidates: {len(candidates)}, Brier score {brier:.3f}",
            "",
            "| said | true | candidates |",
            "|---|---|---|",
        ]
    for fifth in range(5):
        part = [(p, hit) for p, hit in candidates if min(int(p * 5), 4) == fifth]
        if part:
            said, was = (sum(values) / len(part) for values in zip(*part, strict=True))
            lines.append(f"| {said:.2f} | {was:.2f} | {len(part)} |")
    return "\n".join(lines)
