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


@dataclass(frozen=True)
class Score:
    """What an answer to a case is worth."""

    case: Case
    first: str  # id and severity of the first finding
    wrong: str  # empty if the answer is right
    causes: tuple[str, ...]  # that are named
    false_causes: tuple[str, ...]  # of them, those that are not true, or all if nothing costs anything
    inside: bool | None  # the interval of a true finding's effect holds the true effect; None: not measured
    candidates: tuple[tuple[float, bool], ...]  # probability, and whether it is true
    seconds: float
    late: bool  # it took more than 1.2 times its budget

    def row(self) -> str:
        """A line of a Markdown table."""
        effect = self.case.effect
        true = "" if effect is None else f"{effect.mean:+.3f} [{effect.low:+.3f}, {effect.high:+.3f}]"
        interval = {None: "", True: "holds it", False: "**does not**"}[self.inside]
        answer = "right" if not self.wrong else f"**wrong**: {self.wrong}"
        cells = (
            self.case.name,
            self.case.kind,
            true,
            self.first or "nothing",
            answer,
            interval,
            f"{self.seconds:.0f} s",
        )
        return f"| {' | '.join(cells)} |"


HEAD = "| case | kind | true effect | first finding | | its interval | took |\n|---|---|---|---|---|---|---|"


def ask(diagnoser: Diagnoser, case: Case) -> tuple[dict[str, Any], float]:
    """The diagnoser's answer to a case and the seconds that it took; of a command that fails, {"error": …}.

    In a command, {folder} are the case's folders and {options} its options, such as --data and --plm; "netllm" is this one.
    """
    start = time.perf_counter()
    if not isinstance(diagnoser, str):
        return diagnoser(case), time.perf_counter() - start
    options = [word for key, value in case.options.items() for word in (f"--{key}", value)]
    words = diagnoser.format(folder=shlex.join(map(str, case.folders)), options=shlex.join(options))
    with tempfile.TemporaryDirectory() as reports:
        program = "from netllm_lib.cli import main; main()"
        command = [sys.executable, "-c", program, *shlex.split(words)[1:]] if words.startswith("netllm ") else words
        env = os.environ | {"NETLLM_REPORTS": reports, "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(
            command, shell=isinstance(command, str), env=env, capture_output=True, text=True, check=False
        )
    seconds, lines = time.perf_counter() - start, done.stdout.splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        said = (done.stderr.strip().splitlines() or ["no JSON in its last line"])[-1]
        return {"error": said}, seconds
    return json.loads(lines[-1]), seconds


def budget_of(diagnoser: Diagnoser) -> float | None:
    """The sum of the seconds that a command allows itself."""
    found = re.findall(r"--(?:budget|retrain)[ =](\d+(?:\.\d+)?)", diagnoser) if isinstance(diagnoser, str) else []
    return sum(map(float, found)) or None


def score(diagnoser: Diagnoser, case: Case) -> Score:
    """Ask, and judge the answer."""
    answer, seconds = ask(diagnoser, case)
    return judge(case, answer, seconds, budget_of(diagnoser))


def judge(case: Case, answer: dict[str, Any], seconds: float = 0.0, budget_s: float | None = None) -> Score:
    """See `Case.kind` for what is right."""
    findings: Sequence[dict[str, Any]] = answer.get("findings", [])
    true = accepted(case.truth)
    first = findings[0] if findings else {"id": "", "severity": ""}
    causes = tuple(finding["id"] for finding in findings if finding["severity"] == "cause")
    false = tuple(id for id in causes if case.kind == "harmless" or id not in true)
    if "error" in answer:
        wrong = f"failed, {answer['error']}"
    elif case.kind == "harmless":
        wrong = f"{', '.join(false)} as cause" if false else ""
    elif case.kind == "open":
        wrong = f"{', '.join(false)} as cause, it is {case.truth[0]}" if false else ""
    elif first["id"] not in true:
        wrong = f"it is {case.truth[0]}"
    else:
        wrong = "a mere note" if case.kind == "harmful" and first["severity"] == "note" else ""
    effects = [finding["effect"] for finding in findings if finding["id"] in true and finding.get("effect")]
    inside = None
    if effects and case.effect is not None:
        inside = effects[0]["low"] <= case.effect.mean <= effects[0]["high"]
    candidates = tuple((float(one["probability"]), one["id"] in true) for one in answer.get("candidates") or [])
    late = budget_s is not None and seconds > SLACK * budget_s
    shown = f"{first['id']} ({first['severity']})" if first["id"] else ""
    return Score(case, shown, wrong, causes, false, inside, candidates, seconds, late)


def summary(scores: Sequence[Score]) -> str:
    """Counts, and the reliability of the candidates' probabilities, as Markdown."""
    kinds = {kind: [s for s in scores if s.case.kind == kind] for kind in ("harmful", "measured", "open", "harmless")}
    asked = [s for kind in ("harmful", "measured") for s in kinds[kind]]
    others = [s for kind in ("open", "harmless") for s in kinds[kind]]
    inside = [s.inside for s in scores if s.inside is not None]
    lines = [
        f"- first finding true: {sum(not s.wrong for s in asked)} of {len(asked)} faults",
        f"- false causes: {sum(bool(s.wrong) for s in others)} of {len(others)} healthy, harmless or undecided runs",
        f"- true effect in the estimated interval: {sum(inside)} of {len(inside)}",
        f"- beyond {SLACK} times the budget: {sum(s.late for s in scores)} of {len(scores)}",
    ]
    candidates = [one for s in scores for one in s.candidates]
    if candidates:
        brier = sum((p - hit) ** 2 for p, hit in candidates) / len(candidates)
        lines += [
            f"- candidates: {len(candidates)}, Brier score {brier:.3f}",
            "",
            "| said | was true | candidates |",
            "|---|---|---|",
        ]
        for low in (0.0, 0.2, 0.4, 0.6, 0.8):
            part = [(p, hit) for p, hit in candidates if low <= p < low + 0.2 or (p == 1 and low == 0.8)]
            if part:
                said, was = (sum(values) / len(part) for values in zip(*part, strict=True))
                lines.append(f"| {said:.2f} | {was:.2f} | {len(part)} |")
    return "\n".join(lines)
