"""`python -m bench.report`: tables and the chart from a results file, and the README's part."""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median

from bench.environments import ROOT

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NAMES = {
    "ours": "roialign",
    "onnxruntime": "ONNX Runtime",
    "paddle": "Paddle",
    "openvino": "OpenVINO",
    "mindspore": "MindSpore",
    "torchvision": "torchvision",
}
OPERATIONS = {"forward": "Forward", "adjoint": "Adjoint", "box_gradient": "Box gradient"}
CACHE = 4 * 2**20  # bytes; a call that moves less has no DRAM floor
BASE = {"dtype": "float32", "layout": "nchw"}


class Rows:
    """The rows of a record, found by their fields."""

    def __init__(self, record):
        self.record = record
        self.rows = record["rows"]
        self.settings = record["settings"]

    def select(self, **fields):
        return [
            row for row in self.rows if all(row[name] == value for name, value in fields.items())
        ]

    def ours(self, workload, operation, **fields):
        """The timed row of ours, in the main variant but for `fields`; None if there is none."""
        fields = {
            **BASE,
            "convention": self.settings["convention"],
            "out": self.settings["out"],
            **fields,
        }
        rows = self.select(workload=workload, operation=operation, by="ours", **fields)
        return rows[0] if rows and "samples" in rows[0] else None

    def peers(self, workload, operation, **variant):
        """Name -> (its row, the row of ours with the same convention)."""
        variant = {**BASE, **variant}
        found = {}
        for row in self.select(workload=workload, operation=operation, **variant):
            ours = self.ours(workload, operation, convention=row["convention"], **variant)
            if row["by"] != "ours" and ours:
                found[row["by"]] = row, ours
        return found

    def fastest(self, workload, operation, **variant):
        """(name, its seconds, ratio to ours, the least and the largest ratio of a round)."""
        peers = self.peers(workload, operation, **variant)
        timed = {name: pair for name, pair in peers.items() if "samples" in pair[0]}
        if not timed:
            return None
        name = min(timed, key=lambda name: middle(timed[name][0]))
        return name, middle(timed[name][0]), *ratio(*timed[name])

    @property
    def workloads(self):
        return list(dict.fromkeys(row["workload"] for row in self.rows))

    def title(self, workload):
        return f"{workload} {self.record['workloads'][workload]}"

    @property
    def names(self):
        present = {row["by"] for row in self.rows}
        return [name for name in NAMES if name != "ours" and name in present]


def flat(row):
    return [seconds for samples in row["samples"] for seconds in samples]


def middle(row):
    return median(flat(row))


def ratio(row, other):
    """Ratio of the medians, and the least and the largest ratio of the medians of one round."""
    rounds = [
        median(one) / median(two) for one, two in zip(row["samples"], other["samples"], strict=True)
    ]
    return middle(row) / middle(other), min(rounds), max(rounds)


def times_floor(row, kind="dram_and_cache"):
    """How many times the floor a row takes; "-" where all of it fits a cache."""
    return f"{middle(row) / row['floor'][kind]:.1f}" if row["floor"]["bytes"] > CACHE else "-"


def milliseconds(seconds):
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(row):
    times = flat(row)
    low, mid, high = (milliseconds(t) for t in (min(times), median(times), max(times)))
    return f"{mid} ({low}..{high})"


def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main_table(rows, operation):
    header = ["", "roialign, ms", *(f"{NAMES[name]}, ms" for name in rows.names)]
    header += ["fastest / roialign", "roialign / DRAM floor", "/ DRAM + cache floor"]
    lines = []
    for workload in rows.workloads:
        ours = rows.ours(workload, operation)
        if not ours:
            continue
        peers = rows.peers(workload, operation)
        cells = []
        for name in rows.names:
            row = peers.get(name, (None,))[0]
            cells.append("-" if row is None else spread(row) if "samples" in row else "refused")
        fastest = rows.fastest(workload, operation)
        floors = [times_floor(ours, kind) for kind in ("dram", "dram_and_cache")]
        lines.append(
            [workload, spread(ours), *cells]
            + ["{2:.1f} ({3:.1f}..{4:.1f})".format(*fastest) if fastest else "-"]
            + floors
        )
    return markdown(header, lines) if lines else ""


def variants_table(rows):
    """Ratios of ours to ours: layout, dtype, box gradient to adjoint, without `out=`.

    A peer that has the variant too follows, with its time over ours.
    """
    variants = ({"layout": "nhwc"}, {"dtype": "float16"}, {"dtype": "bfloat16"})
    header = ["", "channels_last / NCHW", "float16 / float32", "bfloat16 / float32"]
    header += ["without / with `out=`", "box gradient / adjoint"]
    lines = []
    for workload in rows.workloads:
        for operation, title in OPERATIONS.items():
            base = rows.ours(workload, operation)
            if not base:
                continue
            cells = []
            for change in (*variants, {"out": not rows.settings["out"]}):
                row = rows.ours(workload, operation, **change)
                cell = f"{ratio(row, base)[0]:.2f}" if row else "-"
                fastest = (
                    rows.fastest(workload, operation, **change) if change in variants else None
                )
                cells.append(
                    cell + (f" ({NAMES[fastest[0]]} {fastest[2]:.0f}x)" if fastest else "")
                )
            adjoint = rows.ours(workload, "adjoint")
            both = operation == "box_gradient" and adjoint
            cells.append(f"{ratio(base, adjoint)[0]:.2f}" if both else "-")
            lines.append([f"{workload} {title.lower()}", *cells])
    return markdown(header, lines) if lines else ""


def extras_lines(record):
    if "import" in record:
        yield f"`import roialign` beyond NumPy: {milliseconds(median(record['import']))} ms."
    if "huge_box" in record:
        of_map, huge = (
            median(t for samples in record["huge_box"][name] for t in samples)
            for name in ("map", "1e9 px")
        )
        yield (
            f"One adaptive box of 1e9 px: {milliseconds(huge)} ms, "
            f"{huge / of_map:.2f} times one of the map's size."
        )


def memory_table(record):
    lines = [
        [f"{row['workload']} {OPERATIONS[row['operation']].lower()}"]
        + [f"{row[bytes_] / 2**20:.1f}" for bytes_ in ("bytes", "scratch")]
        for row in record.get("memory", ())
    ]
    header = ["A first call beyond inputs and output", "MiB", "256 x H x W per thread"]
    return markdown(header, lines) if lines else ""


def machine_line(record):
    machine, settings = record["machine"], record["settings"]
    versions = ", ".join(
        f"{package} {version}"
        for packages in record["versions"].values()
        for package, version in packages.items()
    )
    gigabytes = {name: f"{value / 1e9:.1f}" for name, value in record["bandwidth"].items()}
    return (
        f"{machine['cpu']}, {settings['threads']} thread(s), huge pages `{machine['huge_pages']}`, "
        f"convention `{settings['convention']}` (MindSpore and ours against it: `mindspore`), "
        f"{settings['rounds']} interleaved rounds, {record['date'][:10]}. "
        f"Bandwidth in GB/s: copy {gigabytes['copy']}, read {gigabytes['read']}, "
        f"L2 {gigabytes['cache']}. {versions}."
    )


def tables(record):
    """Everything that a record says, in Markdown."""
    rows = Rows(record)
    parts = [machine_line(record), "Median (least..largest)."]
    for operation, title in OPERATIONS.items():
        table = main_table(rows, operation)
        if table:
            parts += [f"**{title}**", table]
    parts += ["**Ours against ours**", variants_table(rows)]
    parts += [*extras_lines(record), memory_table(record)]
    refused = [row for row in record["rows"] if "refused" in row]
    parts += [
        f"Refused: {NAMES[row['by']]}, {row['workload']} {row['operation']}: {row['refused']}."
        for row in refused
    ]
    return "\n\n".join(part for part in parts if part)


def short_tables(runs, image):
    """The README's part: the chart, medians against the fastest other, and more threads."""
    record = main_run(runs)
    rows = Rows(record)
    parts = [f"![Milliseconds per call, roialign and others]({image})"]
    for operation in ("forward", "adjoint"):
        lines = []
        for workload, ours, fastest in compared(rows, operation):
            name, seconds, times = fastest[:3]
            cells = [milliseconds(middle(ours)), f"{milliseconds(seconds)} ({NAMES[name]})"]
            lines.append([rows.title(workload), *cells, f"{times:.0f}x", times_floor(ours)])
        header = [OPERATIONS[operation], "roialign, ms", "fastest other, ms", "faster"]
        header += ["roialign / memory floor"]
        if lines:
            parts.append(markdown(header, lines))
    by_threads = {run["settings"]["threads"]: run for run in runs}  # the last of each
    for threads, run in sorted(by_threads.items()):
        if threads != record["settings"]["threads"]:
            found = ", ".join(
                f"{workload} {milliseconds(middle(ours))} ms ({fastest[2]:.0f}x)"
                for workload, ours, fastest in compared(Rows(run), "forward")
            )
            parts.append(f"Forward with {threads} threads: {found}.")
    return "\n\n".join([*parts, machine_line(record)])


def main_run(runs):
    """The last run of those with the fewest threads."""
    threads = min(run["settings"]["threads"] for run in runs)
    return [run for run in runs if run["settings"]["threads"] == threads][-1]


def compared(rows, operation):
    for workload in rows.workloads:
        ours, fastest = rows.ours(workload, operation), rows.fastest(workload, operation)
        if ours and fastest:
            yield workload, ours, fastest


def chart(record, path):
    """Bars of milliseconds per call, a panel each for forward and adjoint, and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = Rows(record)
    panels = [name for name in ("forward", "adjoint") if rows.select(operation=name)]
    names = ["ours", *rows.names]
    colours = dict(zip(NAMES, pyplot.get_cmap("tab10").colors, strict=False))
    height = 0.8 / len(names)
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
        figsize=(5.5 * len(panels) + 1, 0.16 * len(names) * len(rows.workloads) + 1.6),
    )
    for ax, operation in zip(axes[0], panels, strict=True):
        for place, workload in enumerate(rows.workloads):
            ours = rows.ours(workload, operation)
            if not ours:
                continue
            peers = rows.peers(workload, operation)
            for i, name in enumerate(names):
                row = ours if name == "ours" else peers.get(name, ({},))[0]
                if "samples" not in row:
                    continue
                times = [1000 * seconds for seconds in flat(row)]
                y = place + (i + 0.5) * height - 0.4
                ax.barh(y, median(times), height, color=colours[name])
                ax.plot([min(times), max(times)], [y, y], color="black", linewidth=0.6)
            if ours["floor"]["bytes"] > CACHE:
                floor = 1000 * ours["floor"]["dram_and_cache"]
                ax.plot([floor, floor], [place - 0.4, place - 0.4 + height], color="black")
            fastest = rows.fastest(workload, operation)
            if fastest:
                y = place + 0.5 * height - 0.4
                ax.text(
                    1000 * max(flat(ours)) * 1.15, y, f"{fastest[2]:.0f}x", va="center", fontsize=8
                )
        ax.set_xscale("log")
        ax.set_title(OPERATIONS[operation])
        ax.set_xlabel("ms per call (the lower, the better)")
        ax.set_axisbelow(True)
        ax.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(rows.workloads)), map(rows.title, rows.workloads))
    axes[0, 0].margins(y=0.01)
    axes[0, 0].invert_yaxis()
    keys = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    keys.append(pyplot.Line2D([], [], color="black", marker="|", linestyle="none", markersize=10))
    labels = [*(NAMES[name] for name in names), "memory floor of roialign's bar"]
    figure.legend(keys, labels, loc="outside lower center", ncols=4, frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def rewrite(readme, text):
    """Puts `text` between the markers of a README."""
    readme = Path(readme)
    page = readme.read_text()
    if BEGIN not in page or END not in page:
        raise SystemExit(f"{readme} has no {BEGIN} and {END}")
    before, rest = page.split(BEGIN, 1)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")


def records(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    add = parser.add_argument
    add("file", nargs="?", help="a results file; the newest if not given")
    add("--line", type=int, help="which run of the file, -1 the last; all if not given")
    add("--chart", metavar="PNG", help="where to draw the chart")
    add("--readme", metavar="FILE", help="rewrite the part of this file between the markers")
    given = parser.parse_args(arguments)
    files = sorted((ROOT / "bench" / "results").glob("*.jsonl"), key=lambda f: f.stat().st_mtime)
    if not (given.file or files):
        raise SystemExit("no results yet: python -m bench")
    runs = records(given.file or files[-1])
    if given.line is not None:
        runs = [runs[given.line]]
    for record in runs:
        print(tables(record), end="\n\n")
    image = Path(given.chart or ROOT / "docs" / "images" / "bench.png")
    if given.chart or given.readme:
        chart(main_run(runs), image)
    if given.readme:
        where = os.path.relpath(image, Path(given.readme).parent)
        rewrite(given.readme, short_tables(runs, where))


if __name__ == "__main__":
    sys.exit(main())
