"""The result of `bench.gpu` as a text that fits into a terminal's end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

MOST_CHARACTERS = 8000


def summary(result: Mapping[str, Any]) -> str:
    """Return what was measured in at most `MOST_CHARACTERS`; what is cut is counted."""
    machine, tests = result["machine"], result["tests"]
    head = [f"{machine.get('gpu') or machine.get('cpu', 'unknown')}, torch {machine.get('torch')}, {_timing(result)}"]
    head += [f"{one.pop('ceiling')}: {_numbers(one)}" for one in map(dict, result["ceilings"])]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tests.items())) or "none"
    head += [f"tests: {counts}", *(f"NOT RUN in {group}: {len(names)}" for group, names in result["not_run"].items())]
    lines = _section("goals", map(_goal, result["goals"]), 1800)
    lines += _section("FAILED", (f"{name}: {_one_line(text)}" for name, text in result["failures"].items()), 2200)
    text = "\n".join(line[:200] for line in [*head, *lines])
    cases = _section("operators: us, host us, over peer, share of its bandwidth", map(_case, result["cases"]), 10**6)
    for line in cases:
        if len(text) + len(line) > MOST_CHARACTERS - 100:
            return f"{text}\n... the rest is in gpu.json"
        text += f"\n{line}"
    return text


def _section(title: str, lines: Iterable[str], most: int) -> list[str]:
    """Return a title and lines of at most so many characters together, each cut to 200."""
    kept, size = [], 0
    cut = [line[:200] for line in lines]
    for line in cut:
        size += len(line) + 1
        if size > most:
            break
        kept.append(line)
    more = [f"... and {len(cut) - len(kept)} more"] if len(kept) < len(cut) else []
    return [f"-- {title}: {len(cut)}", *kept, *more]


def _timing(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{group} {seconds:.0f} s" for group, seconds in result["seconds"].items())


def _goal(record: Mapping[str, Any]) -> str:
    ratios = record.get("over a plain step", {})
    parts = "".join(f", {name} {ratios[name]}x" for name in ("host", "device") if name in ratios)
    bound = f" ({'<=' if record['at_most'] else '>='} {record['bound']:g})" if record["bound"] is not None else ""
    return f"{'  ' if record['met'] else '! '}{record['measured']}{bound} {record['name']}{parts}"


def _case(record: Mapping[str, Any]) -> str:
    if "device_us" not in record:
        return _numbers(record)
    marks = "" if "met" not in record else (" ok" if record["met"] else f" ! < {record['at_least']}")
    rate = f" {record['TFLOP_per_s']} TFLOP/s" if "TFLOP_per_s" in record else ""
    numbers = (
        f"{record['device_us']} {record['host_us']} {record['time_over_peer']}x {record['share_of_peer_bandwidth']}"
    )
    return f"{record['case']}: {numbers}{marks}{rate}"


def _numbers(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} {name.replace('_per_', '/')}" for name, value in record.items())


def _one_line(text: str) -> str:
    return " ".join(text.split())
