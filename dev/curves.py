#!/usr/bin/env python3
"""curves.py: loss curves of several runs, as an SVG and as a table.

    dev/curves.py --out dev/curves/30m.svg bf16=runs/a/metrics.jsonl 'quartet rtn=runs/b/metrics.jsonl'

Left: training loss, mean of the --mean steps around each point. Right: validation loss, or, with --gap, its distance
from the first run's. The table (Markdown, on stdout) has both at every validation of the first run, and the largest
share of groups under the carrier's window that the telemetry saw for each operand. Needs matplotlib.
"""
import argparse
import json

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  after the backend is chosen

OPERANDS = ("x", "w", "dy", "wt", "dyt", "xt")


def read_run(path):
    """(steps [(tokens, loss)], validations {step: loss}, shares {operand: largest}, step -> tokens) of metrics.jsonl"""
    steps, validations, shares = {}, {}, {}
    with open(path) as file:
        for line in file:
            record = json.loads(line)
            if record["type"] == "step":
                steps[record["step"]] = (record["tokens"], record["loss"])
                for operand, share in record.get("under_window", {}).items():
                    shares[operand] = max(shares.get(operand, 0.0), share)
            elif record["type"] == "val":
                validations[record["step"]] = record["loss"]
    return steps, validations, shares


def mean_before(steps, step, count):
    """mean training loss of the `count` steps up to `step`"""
    losses = [steps[i][1] for i in range(step - count + 1, step + 1) if i in steps]
    return sum(losses) / len(losses) if losses else float("nan")


def print_table(runs, mean):
    first = next(iter(runs.values()))
    names = list(runs)
    print("| step (tokens) | " + " | ".join(f"{n}: training, validation" for n in names) + " |")
    print("| --- |" + " --- |" * len(names))
    for step in sorted(first[1]):
        cells = [f"{mean_before(s, step, mean):.3f}, " + (f"{v[step]:.4f}" if step in v else "-")
                 for s, v, _ in runs.values()]
        print(f"| {step} ({first[0][step][0] / 1e6:.0f} M) | " + " | ".join(cells) + " |")
    for name, (_, _, shares) in runs.items():
        if shares:
            print(f"{name}, largest share of groups under the window: "
                  + ", ".join(f"{o} {shares[o]:.3g}" for o in OPERANDS if o in shares))


def draw(runs, options):
    plt.rcParams["svg.hashsalt"] = "curves"  # the same figures give the same file
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    reference = next(iter(runs.values()))[1]
    for name, (steps, validations, _) in runs.items():
        points = sorted(steps)[options.mean - 1::options.mean]
        left.plot([steps[i][0] / 1e6 for i in points], [mean_before(steps, i, options.mean) for i in points],
                  label=name, linewidth=1)
        marks = [i for i in sorted(validations) if not options.gap or i in reference]
        right.plot([steps[i][0] / 1e6 for i in marks],
                   [validations[i] - (reference[i] if options.gap else 0.0) for i in marks], marker=".", label=name,
                   linewidth=1)
    left.set(xlabel="million tokens", ylabel="training loss, nats a token", ylim=options.ylim)
    right.set(xlabel="million tokens",
              ylabel="validation loss - the first run's" if options.gap else "validation loss, nats a token",
              ylim=None if options.gap else options.ylim)
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(options.title)
    figure.tight_layout()
    figure.savefig(options.out, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--out", help="SVG to write")
    parser.add_argument("--mean", type=int, default=10, help="steps a point of the training curve [10]")
    parser.add_argument("--gap", action="store_true", help="validation as distance from the first run")
    parser.add_argument("--ylim", type=float, nargs=2, help="lowest and highest loss shown")
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    runs = {}
    for item in options.runs:
        name, separator, path = item.partition("=")
        if not separator:
            parser.error(f"'{item}' is not NAME=FILE")
        runs[name] = read_run(path)
    print_table(runs, options.mean)
    if options.out:
        draw(runs, options)


if __name__ == "__main__":
    main()
