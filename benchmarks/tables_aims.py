"""The table of aims: what the default recipe's students were to reach on SmolLM2, and what they reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tables_quality import quality_source, window_alone

Row = dict[str, Any]
TASKS = ("hyperbaton", "sva_linzen", "wikihow_step")


def aims_table(data: Row) -> list[str]:
    rows = [row for row in data["rows"] if "error" not in row]
    lines = ["| aim | reached | |", "|---|---|---|"]
    for aim, reached, met in (line for group in GROUPS for line in group(rows)):
        lines.append(f"| {aim} | {reached} | {'met' if met else '**missed**'} |")
    return [*lines, "", quality_source(data)]


def of(rows: list[Row], whole: bool = True, **wanted: Any) -> list[Row]:
    """Rows of the default recipe, at its own rates, with these columns; `whole` asks for the slower figures, too."""
    found = [
        row
        for row in rows
        if row["recipe"] == "default" and row.get("rate", 1) == 1 and all(row[k] == v for k, v in wanted.items())
    ]
    return [row for row in found if row.get("tasks") or not whole]


def hybrid(rows: list[Row], keep: str, keys: int | None = None) -> Row:
    return of(rows, keep_softmax=keep, keep_window=keys)[0]


def times(row: Row) -> float:
    """Recall loss in the teacher's."""
    return row["recall"] / row["recall_teacher"]


def starts(rows: list[Row]) -> list[tuple[str, str, bool]]:
    alone = window_alone(rows)
    found = [row for row in rows if row["recipe"] == "start"]
    kl, ratio = max(row["kl"] for row in found), max(row["ppl_ratio"] for row in found)
    return [
        (
            f"before training, every mixer: KL and ratio below the window's alone ({alone['kl']:.3f}, "
            f"{alone['ppl_ratio']:.3f})",
            f"worst of {len(found)}: {kl:.3f}, {ratio:.3f}",
            kl < alone["kl"] and ratio < alone["ppl_ratio"],
        )
    ]


def windows(rows: list[Row]) -> list[tuple[str, str, bool]]:
    fives = [row for row in of(rows, keep_softmax=None, window=64) if row["settings"].get("stages.logits.share") != 1e6]
    control = next(row for row in of(rows) if row["settings"].get("stages.logits.linear_branch") is False)
    worst = max(fives, key=lambda row: row["kl"])
    recall = max(row["recall"] for row in fives)
    return [
        (
            "every mixer, window 64: KL at most 0.20, and KL and recall below the window's alone, trained alike "
            f"({control['kl']:.3f}, {control['recall']:.2f})",
            f"worst of {len(fives)}: {worst['kl']:.3f}, {recall:.2f}",
            worst["kl"] <= 0.2 and worst["kl"] < control["kl"] and recall < control["recall"],
        )
    ]


def hybrids(rows: list[Row]) -> list[tuple[str, str, bool]]:
    nine, five = hybrid(rows, "heads:auto:9"), hybrid(rows, "heads:auto:5")
    chosen, even = hybrid(rows, "auto:6"), hybrid(rows, "every:5")
    bounded = hybrid(rows, "heads:auto:9", 512)
    told = "KL {kl:.3f}, ratio {ppl_ratio:.3f}, recall {times:.2f} times".format
    better = {name: chosen[name] < even[name] for name in ("kl", "ppl_ratio", "recall")}
    better |= {name: chosen["tasks"][name]["student"] > even["tasks"][name]["student"] for name in chosen["tasks"]}
    better |= {
        f"retrieval at {a['context']}": a["student"] > b["student"]
        for a, b in zip(chosen["retrieval"], even["retrieval"], strict=True)
    }
    worse = [name for name, is_better in better.items() if not is_better]
    return [
        (
            "9 of 90 key groups softmax: KL 0.04, ratio 1.015, recall 1.3 times the teacher's",
            told(**nine, times=times(nine)),
            nine["kl"] <= 0.04 and nine["ppl_ratio"] <= 1.015 and times(nine) <= 1.3,
        ),
        (
            "5 of 90: KL 0.07, recall 2.5 times",
            told(**five, times=times(five)),
            five["kl"] <= 0.07 and times(five) <= 2.5,
        ),
        ("6 of 30 layers, chosen: recall 2.5 times", told(**chosen, times=times(chosen)), times(chosen) <= 2.5),
        (
            "6 of 30 layers: chosen better than evenly spaced in every figure",
            f"in {sum(better.values())} of {len(better)}" + "".join(f"; not in {name}" for name in worse),
            not worse,
        ),
        (
            "no unbounded softmax: KL 0.10, ratio 1.05, recall 6 times",
            told(**bounded, times=times(bounded)) + " (9 groups of 512 keys)",
            bounded["kl"] <= 0.1 and bounded["ppl_ratio"] <= 1.05 and times(bounded) <= 6,
        ),
    ]


def tasks(rows: list[Row]) -> list[tuple[str, str, bool]]:
    nine, bounded = hybrid(rows, "heads:auto:9"), hybrid(rows, "heads:auto:9", 512)
    share = {
        name: row["tasks"]["squad_dev"]["student"] / row["tasks"]["squad_dev"]["teacher"]
        for name, row in (("nine", nine), ("bounded", bounded))
    }
    offs = [(row["tasks"][task]["student"] - row["tasks"][task]["teacher"], task) for row in of(rows) for task in TASKS]
    worst = max(offs, key=lambda found: abs(found[0]))
    return [
        ("answers, 9 of 90 key groups: 95 % of the teacher's", f"{share['nine']:.0%}", share["nine"] >= 0.95),
        ("answers, no unbounded softmax: 60 %", f"{share['bounded']:.0%}", share["bounded"] >= 0.6),
        (
            "choice tasks: within 2 points of the teacher",
            f"worst of {len(offs)}: {100 * worst[0]:+.1f} ({worst[1]})",
            abs(worst[0]) <= 0.02 + 1e-9,
        ),
    ]


def retrieval(rows: list[Row]) -> list[tuple[str, str, bool]]:
    lines = []
    for keep, keys in (
        ("heads:auto:9", None),
        ("auto:6", None),
        ("heads:auto:9", 2048),
        ("heads:auto:5", None),
        ("heads:auto:9", 512),
    ):
        found = {entry["context"]: entry["student"] for entry in hybrid(rows, keep, keys)["retrieval"]}
        lines.append(
            (
                f"retrieval at 2048 not below half of that at 1024, `{keep}`" + (f" of {keys} keys" if keys else ""),
                f"{found[2048]:.2f} of {found[1024]:.2f}",
                found[2048] >= found[1024] / 2,
            )
        )
    return lines


def pace(rows: list[Row]) -> list[tuple[str, str, bool]]:
    alone = [row for row in of(rows, whole=False, keep_softmax=None, window=64) if row["tokens"] > 9e6]
    fastest = min(alone, key=lambda row: row["seconds"])
    parts = ", ".join(f"{stage['name']} {stage['seconds']:.0f}" for stage in fastest["stages"])
    return [
        ("the default recipe, 10M tokens: 300 s", f"{fastest['seconds']:.0f} s ({parts})", fastest["seconds"] <= 300)
    ]


def recipes(rows: list[Row]) -> list[tuple[str, str, bool]]:
    lines = []
    for name, window, kept in (
        ("window 64", 64, False),
        ("no window", 0, False),
        ("no window, 27 % of the KV", 0, True),
    ):
        best: dict[bool, tuple[float, float]] = {}
        for own in (True, False):
            found = [
                row
                for row in rows
                if (row["recipe"] == "default") == own
                and row["recipe"] != "start"
                and row["window"] == window
                and bool(row["kv_share"]) == kept
                and round(row["tokens"] / 1e6) == 5
            ]
            best[own] = min(row["kl"] for row in found), min(row["recall"] for row in found)
        lines.append(
            (
                f"best of ours before the best of the published recipes in KL, and in recall, {name}",
                f"{best[True][0]:.3f} to {best[False][0]:.3f}, {best[True][1]:.2f} to {best[False][1]:.2f}",
                best[True][0] < best[False][0] and best[True][1] < best[False][1],
            )
        )
    return lines


GROUPS: tuple[Callable[[list[Row]], list[tuple[str, str, bool]]], ...] = (
    starts,
    windows,
    hybrids,
    recipes,
    tasks,
    retrieval,
    pace,
)
