"""`python -m bench.gpu_report`: tables of a GPU's record, the ratios asked for beside."""

import argparse
import sys

from bench import report
from bench.environments import ROOT

NAMES = ("ours", "torchvision", "torchvision, deterministic")
TITLES = dict(zip(NAMES, ("roialign", *NAMES[1:]), strict=True))
CASE = ("operation", "dtype", "layout")

# workload: torchvision's time over ours, at least, in float32 NCHW
GOALS = {
    "forward": {"W1": 4, "W1f": 4, "W5": 4, "W2": 6, "W4": 6},
    "adjoint": {"W1": 3, "W4": 3, "W5": 3},
}
DETERMINISTIC_GOAL = 50  # the adjoint of VARIED, in time and in memory
FLOOR_GOALS = {"forward": {"W1": 2.5, "W1f": 2.5, "W5": 2.5}}  # times the floor, at most
BOX_GRADIENT_GOAL = 1.5  # times our adjoint, at most
BFLOAT16_GOAL = 1.6  # float32's time over bfloat16's, at least, of the forwards in FLOOR_GOALS
LAUNCH_GOAL = 1  # torchvision's time over ours, at least


class Rows(report.Rows):
    """The rows of a record, found by their fields."""

    def timed(self, by, workload, operation, **variant):
        """The timed row of a contestant; None if there is none."""
        fields = {**report.BASE, **variant}
        rows = self.select(by=by, workload=workload, operation=operation, **fields)
        return next((row for row in rows if row.get("samples")), None)


def ratio(row, other, goal=None, mark=">="):
    """How many times a row takes the time of another, and what was asked."""
    if not (row and other):
        return "-"
    found = "{:.2f} ({:.2f}..{:.2f})".format(*report.ratio(row, other))
    return f"{found}, asked {mark} {goal}" if goal else found


def spread(row):
    return report.spread(row) if row else "-"


def main_table(rows, operation, names):
    header = ["", *(f"{TITLES[name]}, ms" for name in names)]
    header += [f"{name} / roialign" for name in names[1:]] + ["roialign / copy floor"]
    lines = []
    for workload in rows.workloads:
        found = [rows.timed(name, workload, operation) for name in names]
        ours = found[0]
        if not ours:
            continue
        goals = (GOALS.get(operation, {}).get(workload), DETERMINISTIC_GOAL)
        ratios = [ratio(row, ours, goal) for row, goal in zip(found[1:], goals, strict=False)]
        floor = report.times_floor(ours, "dram")
        most = FLOOR_GOALS.get(operation, {}).get(workload)
        lines.append(
            [workload, *map(spread, found), *ratios, f"{floor}, asked <= {most}" if most else floor]
        )
    return report.markdown(header, lines) if lines else ""


def variants_table(rows):
    """Ours against ours, and torchvision in the same variant."""
    header = ["", "float32 / bfloat16", "float32 / float16", "NCHW / channels_last"]
    header += ["box gradient / adjoint"]
    changes = ({"dtype": "bfloat16"}, {"dtype": "float16"}, {"layout": "nhwc"})
    lines = []
    for workload in rows.workloads:
        for operation, title in report.OPERATIONS.items():
            base = rows.timed("ours", workload, operation)
            if not base:
                continue
            cells = []
            for change in changes:
                asked = workload in FLOOR_GOALS.get(operation, {}) and change == changes[0]
                ours = rows.timed("ours", workload, operation, **change)
                theirs = rows.timed("torchvision", workload, operation, **change)
                cell = ratio(base, ours, BFLOAT16_GOAL if asked else None)
                if theirs:
                    cell += f"; torchvision / ours {ratio(theirs, ours)}"
                cells.append(cell)
            both = operation == "box_gradient" and rows.timed("ours", workload, "adjoint")
            cells.append(ratio(base, both, BOX_GRADIENT_GOAL, "<=") if both else "-")
            if any(cell != "-" for cell in cells):
                lines.append([f"{workload} {title.lower()}", *cells])
    return report.markdown(header, lines) if lines else ""


def memory_table(record):
    header = ["Forward and backward, beyond inputs and results", "MiB", "/ roialign"]
    ours = {row["workload"]: row.get("bytes") for row in record["memory"] if row["by"] == "ours"}
    lines = []
    for row in record["memory"]:
        bytes_, least = row.get("bytes"), ours.get(row["workload"])
        times = f"{bytes_ / least:.1f}" if bytes_ is not None and least else "-"
        asked = f", asked >= {DETERMINISTIC_GOAL}" if row["by"] == NAMES[2] else ""
        size = "refused" if bytes_ is None else f"{bytes_ / 2**20:.1f}"
        lines.append([f"{row['workload']} {TITLES[row['by']]}", size, times + asked])
    return report.markdown(header, lines) if lines else ""


def launches_table(record):
    header = ["A call among many, wall time", "roialign, us", "torchvision, us"]
    header += ["torchvision / roialign"]
    timed = {
        (row["workload"], row["operation"], row["by"]): row
        for row in record["launches"]
        if row.get("samples")
    }
    lines = []
    for workload, operation in dict.fromkeys((w, operation) for w, operation, _ in timed):
        pair = [timed.get((workload, operation, by)) for by in NAMES[:2]]
        cells = [f"{report.middle(row) * 1e6:.1f}" if row else "-" for row in pair]
        lines.append([f"{workload} {operation}", *cells, ratio(*reversed(pair), LAUNCH_GOAL)])
    return report.markdown(header, lines) if lines else ""


def machine_line(record):
    machine, settings = record["machine"], record["settings"]
    versions = ", ".join(
        f"{package} {version}"
        for packages in record["versions"].values()
        for package, version in packages.items()
    )
    return (
        f"{machine.get('gpu', 'no GPU')}, driver {machine.get('driver')}, "
        f"convention `{settings['convention']}`, {settings['rounds']} interleaved rounds, "
        f"{record['date'][:10]}. Copy {record['bandwidth']['copy'] / 1e9:.0f} GB/s. {versions}."
    )


def tables(record):
    """Everything that a record says, in Markdown."""
    rows = Rows(record)
    names = [name for name in NAMES if rows.select(by=name)]
    parts = [machine_line(record), "Median (least..largest); ratios of medians, and of one round."]
    for operation, title in report.OPERATIONS.items():
        has = [name for name in names if rows.select(by=name, operation=operation)]
        table = main_table(rows, operation, has) if has else ""
        if table:
            parts += [f"**{title}**", table]
    parts += [variants_table(rows), memory_table(record), launches_table(record)]
    for row in (*record["rows"], *record["memory"], *record["launches"]):
        if "refused" in row:
            what = " ".join(row[name] for name in ("workload", *CASE) if name in row)
            parts.append(f"Refused: {TITLES[row['by']]}, {what}: {row['refused']}.")
    if len(names) == 1:
        parts.append("torchvision was not there: ours and the floor only.")
    if record["left_out"]:
        parts.append(f"No time was left for: {'; '.join(record['left_out'])}.")
    return "\n\n".join(part for part in parts if part)


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m bench.gpu_report", description=__doc__)
    parser.add_argument("file", nargs="?", help="a results file; the newest if not given")
    given = parser.parse_args(arguments)
    folder = ROOT / "bench" / "results" / "gpu"
    files = sorted(folder.glob("*.jsonl"), key=lambda file: file.stat().st_mtime)
    if not (given.file or files):
        raise SystemExit("no results yet: python -m bench --device cuda, on a machine with a GPU")
    for record in report.records(given.file or files[-1]):
        print(tables(record), end="\n\n")


if __name__ == "__main__":
    sys.exit(main())
