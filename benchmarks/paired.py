r"""Is one commit slower than another? ``speed.py`` of two checkouts in turn, in pairs.

A pair is a run of ``speed.py`` in each checkout, on one thread, one after the other. Every row of
``speed.py`` is the ratio of our time to a reference in the same process (a step by hand, bare network
calls), so that a machine that is slow for a minute affects both in the same way. The script divides the later
commit's ratio by the earlier one's, pair by pair. It prints the median over pairs and an interval: that of
the sign test at 95 %, or the range if there are few pairs. A row is slower if its interval lies entirely
above 1.03.

    git worktree add /tmp/before <commit>
    python benchmarks/paired.py --before /tmp/before [--pairs 9] [--only step,sampling,bound] [--smoke]
        [--output benchmarks/results]
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SLOWER = 1.03


def main():
    args = parse_arguments()
    trees = {"before": args.before, "after": ROOT}
    pairs = []
    for number in range(args.pairs):
        order = list(trees) if number % 2 == 0 else list(trees)[::-1]
        runs = {name: rows_of(trees[name], args) for name in order}
        pairs.append([{row: runs[name][row] for row in runs["after"]} for name in trees])
        print(f"pair {number + 1} of {args.pairs}", flush=True)
    report(pairs, trees, args)


def rows_of(tree, args):
    """The rows of ``speed.py`` in a checkout: our seconds divided by those of the reference."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "benchmarks/speed.py"), "--output", folder]
        command += ["--only", args.only, "--device", args.device, "--repeats", str(args.repeats)]
        command += ["--num-timesteps", str(args.num_timesteps), "--num-data", str(args.num_data)]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            command + ["--smoke"] * args.smoke, env=environment, check=True, capture_output=True
        )
        rows = json.loads((Path(folder) / "speed.json").read_text())["rows"]
    return {f"{row['work']} / {row['against']}": row["ratio"] for row in rows}


def report(pairs, trees, args):
    """The table, and the JSON with every pair."""
    table = {}
    for name in pairs[0][1]:
        quotients = sorted(after[name] / before[name] for before, after in pairs)
        low, high = interval(quotients)
        slower = "slower" if low > SLOWER else ""
        table[name] = {
            "median": statistics.median(quotients), "low": low, "high": high,
            "verdict": slower, "before": [before[name] for before, _ in pairs],
            "after": [after[name] for _, after in pairs],
        }  # fmt: skip
    print("| work / yardstick | after / before | interval | |\n|---|---|---|---|")
    for name, row in table.items():
        print(
            f"| {name} | {row['median']:.3f} | {row['low']:.3f} … {row['high']:.3f} | {row['verdict']} |"
        )
    slower = sum(bool(row["verdict"]) for row in table.values())
    print(f"\n{slower} of {len(table)} rows are slower by more than {SLOWER - 1:.0%}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "paired.json"
    commits = {name: commit(tree) for name, tree in trees.items()}
    numbers = {"pairs": len(pairs), "commits": commits, "rows": table}
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(numbers, indent=1) + "\n")
    os.replace(aside, path)
    print(f"\nwrote {path}")


def interval(values):
    """The interval of the sign test for a median, at 95 % if there are enough values."""
    count = len(values)
    cut, tail = 0, 0.0
    while True:
        tail += math.comb(count, cut) / 2**count
        if tail > 0.025:
            return values[max(cut - 1, 0)], values[count - 1 - max(cut - 1, 0)]
        cut += 1


def commit(tree):
    """The commit of a checkout, if it is a git repository."""
    result = subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )  # fmt: skip
    return result.stdout.strip()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="checkout of the earlier commit")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="step,sampling,bound")
    parser.add_argument("--num-timesteps", type=int, default=200, help="of bounds and samplers")
    parser.add_argument("--num-data", type=int, default=64, help="of bounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--smoke", action="store_true", help="this checkout beside itself, in seconds"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    if args.smoke:
        args.before, args.pairs, args.repeats, args.only = ROOT, 1, 1, "bound"
        args.num_timesteps, args.num_data = 20, 8
    if args.before is None:
        parser.error(
            "--before: got nothing; expected a checkout. Run git worktree add /tmp/before <commit>."
        )
    return args


if __name__ == "__main__":
    main()
