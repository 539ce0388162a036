"""`python -m bench.report`: tables and the chart from a results file, and parts of documents."""

import argparse
import itertools
import json
import sys
from pathlib import Path
from statistics import median

from bench import run
from bench.environments import ROOT
from bench.peers import CONTESTANT, MAIN, OPERATIONS, PEERS, TITLES, VARIED

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SAMPLED = "<!-- sampled:begin -->", "<!-- sampled:end -->"
USUAL = "torchvision"  # has a column of its own on the page
SHOWN = ("W7", "W7a", "W8", "W4", "W5", "W9a", "W10", "W6")  # in the README
PANELS = ("forward", "adjoint")
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")  # which all eyes tell apart
CACHE = 4 * 2**20  # bytes; a call that moves less has no DRAM floor
PLAIN = {"dtype": "float32", "layout": "nchw", "build": ""}
RESULTS = {"samples", "memory", "refused"}
COLUMNS = ("", "ms", "times", "that of", "times the DRAM floor", "times the DRAM + cache floor")
COLUMNS += ("us above the core alone", "before / after, of a round", "asked")

FPN, HEADS, CALL = ("W1", "W1f", "W5"), ("W2", "W4"), ("a call",)
SLOW = "torchvision_deterministic"
GOALS = (  # on a GPU, in NCHW: of which workloads (or all), whose
    (FPN, "torchvision", "forward", "float32", "times >= 4"),
    (HEADS, "torchvision", "forward", "float32", "times >= 6"),
    (VARIED, "torchvision", "adjoint", "float32", "times >= 3"),
    (VARIED, SLOW, "adjoint", "float32", "times >= 50"),
    (VARIED, SLOW, "backward", "float32", "times >= 50"),  # in memory
    (FPN, "ours", "forward", "float32", "times the floor <= 2.5"),
    (FPN, "ours", "forward", "bfloat16", "times <= 0.625"),
    ((), "ours", "box_gradient", "float32", "times <= 1.5"),
    (CALL, "torchvision", "forward", "float32", "times >= 1"),
    (CALL, "torchvision", "gradient", "float32", "times >= 1"),
    (CALL, "torchvision_captured", "forward", "float32", "times >= 1"),
)


class Rows:
    """The rows of a record, found by their fields."""

    def __init__(self, record):
        self.record, self.settings = record, record["settings"]
        self.rows = [{"build": "", **row} for row in record["rows"]]
        self.device = self.settings.get("device", "cpu")
        self.table = PEERS[self.device]
        self.workloads = list(dict.fromkeys(row["workload"] for row in self.rows))

    def find(self, has="samples", **fields):
        """The row that has samples, in the main variant but for `fields`; None if there is none."""
        wanted = {"by": "ours", "out": self.settings["out"], **PLAIN, **fields}
        if wanted["by"] == "ours":
            wanted.setdefault("convention", self.settings["convention"])
        for row in self.rows:
            if row.get(has) and all(row[name] == value for name, value in wanted.items()):
                return row
        return None

    def other(self, row, has="samples"):
        """The row that a row is divided by: ours; of ours float32 in NCHW, or what is beside it."""
        same = {name: row[name] for name in CONTESTANT}
        changes = [{"by": name} for name in self.table[row["by"]].beside]
        if self.table[row["by"]].ours:
            changes = [PLAIN | {"out": self.settings["out"]}]
            changes.append({"operation": OPERATIONS[row["operation"]].beside or row["operation"]})
            if row["workload"] == "huge":
                changes.append({"workload": "map"})
        found = (self.find(has, **same | change) for change in changes if same | change != same)
        return next(filter(None, found), None)

    def fastest(self, **fields):
        """The fastest row that is not ours, and ours beside it; None if there is none."""
        rows = [self.find(by=name, **fields) for name, peer in self.table.items() if not peer.ours]
        pairs = [self.pair(row) for row in rows if row]
        return min((p for p in pairs if p[1]), key=lambda pair: middle(pair[0]), default=None)

    def others(self, operation):
        """Who else has rows of an operation."""
        found = {row["by"] for row in self.rows if row["operation"] == operation}
        return [by for by, peer in self.table.items() if by in found and not peer.ours]

    def pair(self, row):
        """A row, and ours beside it."""
        return row, self.other(row)

    def compared(self, operation):
        for workload in self.workloads:
            fields = {"workload": workload, "operation": operation}
            ours, fastest = self.find(**fields), self.fastest(**fields)
            if ours and fastest:
                yield workload, ours, *fastest

    def title(self, workload):
        return f"{workload} {self.record['workloads'][workload]}"


def flat(row):
    return [seconds for samples in row["samples"] for seconds in samples]


def middle(row):
    return median(flat(row))


def rounds(row, other):
    """The ratio of the medians of each round."""
    pairs = zip(row["samples"], other["samples"], strict=True)
    return [median(one) / median(two) for one, two in pairs]


def ratio(row, other):
    return middle(row) / middle(other)


def faster(row, other):
    value = ratio(row, other)
    return f"{value:.1f}x" if value < 9.95 else f"{value:.0f}x"


def times_floor(row, kind="dram_and_cache"):
    """How many times the floor a row takes; "-" where all of it fits a cache."""
    floor = row.get("floor", {})
    return f"{middle(row) / floor[kind]:.1f}" if kind in floor and floor["bytes"] > CACHE else "-"


def milliseconds(seconds):
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(values, middle=None, form="{:.2f}".format):
    """The median (or what is given), and the least and the largest."""
    middle = median(values) if middle is None else middle
    return f"{form(middle)} ({form(min(values))}..{form(max(values))})"


def named(row):
    """What a row is of."""
    words = [TITLES[row["by"]], OPERATIONS[row["operation"]].title.lower()]
    words += [row[name] for name in ("dtype", "layout") if row[name] != PLAIN[name]]
    return ", ".join(words)


def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows] if rows else []
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cells(rows, row):
    """A line of the table: of COLUMNS, as many as there are."""
    title = f"{row['workload']} {named(row)}"
    title += f", {row['convention']}" * (row["convention"] != rows.settings["convention"])
    title += ", without `out=`" * (row["out"] != rows.settings["out"])
    if "refused" in row:
        return [title, f"refused: {row['refused']}"]
    has = "memory" if "memory" in row else "samples"
    other, core = rows.other(row, has), rows.find(by="core", workload=row["workload"])
    of = named(other) if other else "-"
    if has == "memory":
        size, scratch = (f"{row[name] / 2**20:.1f}" for name in (has, "scratch"))
        times = f"{row[has] / other[has]:.2f}" if other else "-"
        sizes = f"{size} MiB (256 x H x W a thread: {scratch})"
        return [f"{title}, memory", sizes, times, of, "-", "-", "-", "-", asked(rows, row)]
    before = rows.find(**{name: row[name] for name in CONTESTANT} | {"build": "before"})
    return [
        title,
        spread(flat(row), form=milliseconds),
        spread(rounds(row, other), ratio(row, other)) if other else "-",
        of,
        *(times_floor(row, kind) for kind in ("dram", "dram_and_cache")),
        f"{1e6 * (middle(row) - middle(core)):.1f}" if core else "-",
        spread(rounds(before, row), form="{:.3f}".format) if before else "-",
        asked(rows, row),
    ]


def asked(rows, row):
    where = CALL[0] if rows.settings.get("overhead") else row["workload"]
    found = [
        goal
        for workloads, *of, goal in (GOALS if rows.device == "cuda" else ())
        if [row["by"], row["operation"], row["dtype"]] == of and row["layout"] == "nchw"
        if where in (workloads or rows.workloads)
    ]
    return "; ".join(found) or "-"


def main_table(rows):
    """A line for each contestant."""
    there = [row for row in rows.rows if not row["build"] and row.keys() & RESULTS]
    lines = [cells(rows, row) for row in there if row.get("samples") != []]
    return filled(COLUMNS, [line + ["-"] * (len(COLUMNS) - len(line)) for line in lines])


def filled(header, lines):
    """A table of the columns that are not empty."""
    kept = [i for i in range(len(header)) if any(line[i] != "-" for line in lines)]
    return markdown([header[i] for i in kept], [[line[i] for i in kept] for line in lines])


def machine_line(record):
    machine, settings, found = record["machine"], record["settings"], record["bandwidth"]
    versions = dict.fromkeys(
        f"{package} {version}"
        for packages in record["versions"].values()
        for package, version in packages.items()
    )
    titles = {"copy": "copy", "read": "read", "cache": "L2"}.items()
    speeds = [f"{title} {found[name] / 1e9:.1f}" for name, title in titles if name in found]
    on = f"{machine['cpu']}, {settings['threads']} thread(s), huge pages `{machine['huge_pages']}`"
    if "gpu" in machine:
        on = f"{machine['gpu']}, driver {machine['driver']}"
    conventions = {settings["convention"]: 0} | {row["convention"]: 0 for row in record["rows"]}
    clock = ", CPU time of the process" * (settings.get("clock") == "cpu")
    return (
        f"{on}{clock}, convention `{'` and `'.join(conventions)}`, "
        f"{settings['rounds']} interleaved rounds, {record['date'][:10]}. "
        f"Bandwidth in GB/s: {', '.join(speeds) or '-'}. {', '.join(versions)}."
    )


def tables(record):
    """Everything that a record says, in Markdown."""
    rows = Rows(record)
    how = "Median (least..largest); ratios of medians (of one round)."
    parts = [machine_line(record), how, main_table(rows)]
    if "import" in record:
        seconds = milliseconds(median(record["import"]))
        parts.append(f"`import roialign` beyond NumPy: {seconds} ms.")
    if rows.device == "cuda" and {row["by"] for row in rows.rows} <= {"ours"}:
        parts.append("torchvision was not there: ours and the floor only.")
    if record.get("left_out"):
        parts.append(f"No time was left for: {'; '.join(record['left_out'])}.")
    return "\n\n".join(part for part in parts if part)


def all_tables(runs):
    """The page's part: every workload against the fastest other, and more threads."""
    record = main_run(runs)
    rows, parts = Rows(record), []
    for operation in MAIN:
        lines = []
        for workload, ours, fastest, beside in rows.compared(operation):
            seconds, theirs = (milliseconds(middle(row)) for row in (ours, fastest))
            usual = rows.find(by=USUAL, workload=workload, operation=operation)
            cells = [f"{milliseconds(middle(usual))} ({faster(usual, ours)})" if usual else "-"]
            cells += [f"{theirs} ({TITLES[fastest['by']]})", faster(fastest, beside)]
            lines.append([rows.title(workload), seconds, *cells, times_floor(ours)])
        header = [OPERATIONS[operation].title, "roialign, ms", f"{TITLES[USUAL]}, ms"]
        header += ["fastest other, ms", "faster", "roialign / memory floor"]
        parts.append(filled(header, lines))
    by_threads = {run["settings"]["threads"]: run for run in runs}  # the last of each
    for threads, last in sorted(by_threads.items()):
        if threads != record["settings"]["threads"]:
            found = ", ".join(
                f"{workload} {milliseconds(middle(ours))} ms ({faster(fastest, beside)})"
                for workload, ours, fastest, beside in Rows(last).compared("forward")
            )
            parts.append(f"Forward with {threads} threads: {found}.")
    return "\n\n".join(part for part in [*parts, machine_line(record)] if part)


def in_words(workload):
    """What a workload of the README is."""
    title, (rows, columns) = workload.title, workload.output_size
    boxes, channels = workload.rois_number, workload.shape[1]
    return f"{title}: {boxes} boxes to {rows} x {columns}, channels: {channels}"


def short_table(record, image):
    """The README's part: the chart, our milliseconds, and how many times as long others take."""
    rows, header, lines = Rows(record), [""], []
    shown = [name for name in SHOWN if name in rows.workloads]
    columns = [(operation, by) for operation in PANELS for by in ("ours", *rows.others(operation))]
    for operation, by in columns:
        title = OPERATIONS[operation].title
        header.append(f"{title}: roialign, ms" if by == "ours" else TITLES[by])
    for workload in shown:
        lines.append([in_words(run.EVERY[workload])])
        for operation, by in columns:
            row = rows.find(by=by, workload=workload, operation=operation)
            value = row and (milliseconds(middle(row)) if by == "ours" else faster(*rows.pair(row)))
            lines[-1].append(value or "-")
    picture = f"![How many times as long as roialign others take]({image})"
    return f"{picture}\n\n{markdown(header, lines)}\n\n{machine_line(record)}"


def sampled_table(runs):
    """Of maxima and rotated boxes, each from the last run that has it: beside the mean or their
    forward, and the fastest other.
    """
    lines = {}
    for rows in map(Rows, runs):
        for place in itertools.product(rows.workloads, rows.settings["operations"]):
            fields = dict(zip(("workload", "operation"), place, strict=True))
            ours, fastest = rows.find(**fields), rows.fastest(**fields)
            line = [f"{place[0]} {OPERATIONS[place[1]].title}"]
            line += [spread(flat(ours), form=milliseconds), "-", "-", "-", "-"]
            if other := rows.other(ours):
                line[2:4] = spread(rounds(ours, other), ratio(ours, other)), named(other)
            if fastest:
                theirs = f"{milliseconds(middle(fastest[0]))} ({TITLES[fastest[0]['by']]})"
                line[4:] = theirs, faster(*fastest)
            lines[place] = line
    header = "", "roialign, ms", "times", "that of", "fastest other, ms", "faster"
    ordered = sorted(lines, key=lambda place: (place[0], [*OPERATIONS].index(place[1])))
    return f"{markdown(header, [lines[place] for place in ordered])}\n\n{machine_line(runs[-1])}"


def main_run(runs):
    """The last run of those with the fewest threads."""
    threads = min(run["settings"]["threads"] for run in runs)
    return [run for run in runs if run["settings"]["threads"] == threads][-1]


def chart(record, path):
    """Bars of how many times as long as ours others take, a panel for each operation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = Rows(record)
    shown = [name for name in SHOWN if name in rows.workloads]
    names = list(dict.fromkeys(by for operation in PANELS for by in rows.others(operation)))
    height = 0.8 / max(1, len(names))
    size = 11, 0.22 * len(names) * len(shown) + 1.4
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=size, sharey=True, layout="constrained")
    for ax, operation in zip(axes, PANELS, strict=True):
        for place, i in itertools.product(range(len(shown)), range(len(names))):
            row = rows.find(by=names[i], workload=shown[place], operation=operation)
            if row:
                y, times = place + (i + 0.5) * height - 0.4, ratio(*rows.pair(row))
                ax.barh(y, times, height, color=COLOURS[i])
                ax.text(times, y, f" {faster(*rows.pair(row))}", va="center", fontsize=8)
        ax.axvline(1, color="black", linewidth=1)
        ax.set(title=OPERATIONS[operation].title, axisbelow=True)
        ax.set_xlabel("times as long as roialign (the line: 1x)")
        ax.grid(axis="x", alpha=0.3)
        ax.margins(x=0.12)
    words = [in_words(run.EVERY[name]).replace(": ", "\n", 1) for name in shown]
    axes[0].set_yticks(range(len(shown)), words)
    axes[0].margins(y=0.01)
    axes[0].invert_yaxis()
    keys = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS[: len(names)]]
    labels = [TITLES[name] for name in names]
    figure.legend(keys, labels, loc="outside lower center", ncols=4, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def rewrite(readme, text, begin=BEGIN, end=END):
    """Puts `text` between the markers of a README."""
    before, _, rest = Path(readme).read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{readme} has no {begin} and {end}")
    Path(readme).write_text(f"{before}{begin}\n{text}\n{end}{after}")


def records(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    add = parser.add_argument
    add("file", nargs="?", help="a results file; the newest of the CPU if not given")
    add("--docs", action="store_true", help="rewrite its parts of the documents, and the chart")
    add("--sampled", action="store_true", help="of a record of maxima and rotated boxes, alone")
    given = parser.parse_args(arguments)
    results = ROOT / "bench" / "results"
    files = sorted((results / "sampled" if given.sampled else results).glob("*.jsonl"))
    if not (given.file or files):
        raise SystemExit("no results yet: python -m bench")
    runs = records(given.file or files[-1])
    for record in runs:
        print(tables(record), end="\n\n")
    image, page = "docs/images/bench.png", ROOT / "docs" / "speed.md"
    if given.docs and given.sampled:
        rewrite(page, sampled_table(runs), *SAMPLED)
    elif given.docs:
        chart(main_run(runs), ROOT / image)
        rewrite(ROOT / "README.md", short_table(main_run(runs), image))
        rewrite(page, all_tables(runs))


if __name__ == "__main__":
    sys.exit(main())
