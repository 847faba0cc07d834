"""The page of benchmarks, made from ``benchmarks/results/*.json`` at build time: no number is typed.

A benchmark has a heading, the story in its docstring, a table and its pictures. ``TABLES`` says how the
numbers of a file become rows; a file that is not in it is shown as its ``rows`` are.
"""

import ast
import json
import re
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"


def speed(found):
    head = ["work", "against", "ratio, median (range)", "aim"]
    rows = []
    for r in found["rows"]:
        low, high = r["range"]
        spread = "" if low == high else f" ({low:.2f} to {high:.2f})"
        aim = "–" if r["target"] is None else f"≤ {r['target']:.2f}"
        rows.append([r["work"], r["against"], f"{r['ratio']:.2f}{spread}", aim])
    return table(head, rows)


def evidence(found):
    ratios, arviz = found["ratios"], found["arviz"]
    rows = [
        (f"{found['rows']:,} network rows alone, batches of {found['fastest_batch_size']:,}",
         f"{median(found['network_seconds']):.1f} s"),
        (f"`importance_evidence`, {found['num_particles']:,} × {found['num_data']} trajectories of "
         f"{found['num_timesteps']} steps", f"{median(found['evidence_seconds']):.1f} s"),
        ("ratio, median (range)", f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"),
        ("peak memory above the model", f"{found['peak_memory_mib']:.0f} MiB"),
        ("conversion of the draws for ArviZ", f"{arviz['conversion_seconds']:.3f} s"),
        (f"netCDF of them, {arviz['netcdf_mib']:.0f} MiB", f"{arviz['netcdf_seconds']:.2f} s"),
    ]  # fmt: skip
    return table(["what", "measured"], rows)


def memory_map(found):
    return table(
        ["rows on disk", "file, MB", "anonymous memory, MB", "growth, MB", "rows a second", "time reading"],
        [[f"{r['rows']:,}", f"{r['file_mb']:.0f}", f"{r['anonymous_mb']:.0f}", f"{r['growth_mb']:.1f}",
          f"{r['rows_per_second']:,.0f}", f"{r['reading_share']:.0%}"] for r in found["rows"]],
    )  # fmt: skip


def paired(found):
    rows = [
        [
            work,
            f"{r['median']:.3f}",
            f"{r['low']:.3f} to {r['high']:.3f}",
            r["verdict"] or "not slower",
        ]
        for work, r in found["rows"].items()
    ]
    commits = f"Before is {found['commits']['before']}, after {found['commits']['after']}.\n\n"
    return commits + table(["work / yardstick", "after / before", "interval", "verdict"], rows)


def honesty(found):
    rows = []
    for r in found["rows"]:
        spent = "–" if r["rows"] is None else f"{r['rows']:,.0f}"
        rows.append([
            f"`{r['reader']}`", r["data"], f"{r['num_data']:,}", length(r["num_timesteps"]),
            r["target"] or "–", f"{r['mean_z']:+.2f} ± {r['mean_z_error']:.2f}",
            f"{r['sd_z']:.2f} ± {r['sd_z_error']:.2f}", spent,
        ])  # fmt: skip
    return table(
        ["reader", "data", "N", "T", "target, nats", "mean of z", "sd of z", "network rows"], rows
    )


def calibration(found):
    counts = {(r["check"], r["test"], r["model"]): r["count"] for r in found["rejected"]}
    cases = dict.fromkeys(key[:2] for key in counts)
    rows = [[*case, counts[*case, "truth"], counts[*case, "shifted"]] for case in cases]
    return (
        f"Rejections of {found['repetitions']} data sets of {found['num_data']:,}, "
        f"at the {found['level']:.0%} level:\n\n"
        + table(["check", "test", "truth as model", f"shifted by {found['shift']} sd"], rows)
    )


def smc(found):
    rows = []
    for r in found["rows"]:
        error = (sum(e**2 for e in r["standard_errors"]) / len(r["errors"])) ** 0.5
        reliable = f"{sum(r['reliable'])} of {len(r['reliable'])}"
        rows.append(
            [
                r["denoiser"],
                r["method"],
                f"{r['rms_error']:.2g}",
                f"{error:.2g}",
                reliable,
                f"{r['seconds']:.0f}",
            ]
        )
    return table(
        ["denoiser", "weights", "error, nats", "reported error, nats", "data reliable", "s"], rows
    )


def lengths(found):
    parts = []
    for name, unit in (("digits", "bits/dim"), ("Gaussian", "nats/dim")):
        dimension = {"digits": 64, "Gaussian": 16}[name] * (
            0.6931471805599453 if name == "digits" else 1
        )
        rows = [
            [length(r["num_timesteps"]), r["variance"],
             " ± ".join([f"{-r['bound'] / dimension:.4f}", f"{r['monte_carlo_error'] / dimension:.2g}",
                         f"{r['sampling_error'] / dimension:.2g}"]),
             f"{r['rows']:,}", f"{r['full_rows'] / r['rows']:.1f}" if r["full_rows"] else "–"]
            for r in found[name]
        ]  # fmt: skip
        head = [
            "T",
            "reverse variance",
            f"−bound, {unit} ± Monte Carlo ± sampling",
            "network rows",
            "full sum / rows",
        ]
        parts.append(f"**{name}**\n\n{table(head, rows)}")
    return "\n".join(parts)


def variance(found):
    rows = [
        [r["data"], f"`{r['schedule']}`", f"{r['ends'][0]:.1f} … {r['ends'][1]:.1f}", f"{r['variance']:,.4g}",
         f"{r['learned']:,.4g}", f"{r['floor']:,.4g}", f"{r['learned'] / r['floor']:.3f}",
         f"{r['variance'] / r['learned']:.2f}", f"{r['stratified'] / r['stratified_learned']:.2f}"]
        for r in found["rows"]
    ]  # fmt: skip
    head = ["data", "schedule", "log-SNR", "its variance", "learned", "least", "learned / least",
            "its / learned", "the same, stratified"]  # fmt: skip
    curves = [
        [r["curves"], f"{r['mean']:.1f}", f"{r['variance']:,.0f} ± {r['standard_error']:.2g}"]
        for r in found["by_dimension"]
    ]
    return (
        table(head, rows)
        + "\n"
        + table(["curves", "what is left to integrate", "variance of a row"], curves)
    )


def toys(found):
    def shown(e):
        return f"{e['value']:.4f} ± {e['monte_carlo_error']:.4f} ± {e['sampling_error']:.4f}"

    rows = [
        [r["density"], f"{r['entropy']:.5f}", shown(r["chain"]["negative_bound"]), shown(r["chain"]["gap"]),
         shown(r["limit"]["gap"]), f"{r['fit_cpu_seconds'] / 60:.1f}"]
        for r in found["rows"]
    ]  # fmt: skip
    head = [
        "density",
        "entropy",
        f"−bound, T = {found['num_timesteps']}",
        "gap, paired",
        "gap, T → ∞",
        "CPU minutes to fit",
    ]
    return "Nats, ± Monte Carlo ± sampling:\n\n" + table(head, rows)


def heartbeat(found):
    rows = [
        [
            r["num_timesteps"],
            f"{r['bits']:.4f}",
            f"{r['best_bits']:.4f}",
            f"{r['standard_error']:.4f}",
        ]
        for r in found["rows"]
    ]
    head = ["T", "SVI, bits/sequence", "best bit by bit", "± Monte Carlo, of the difference"]
    return f"log p is {found['log_p_bits']:.4f} bits.\n\n" + table(head, rows)


def ising(found):
    rows = [
        [r["model"], f"{r['parameters']:,}", length(r["num_timesteps"]), f"{r['gap']:.3f}",
         f"{r['standard_error']:.3f}", f"{r['monte_carlo_error']:.3f}", f"{r['fit_cpu_seconds'] / 60:.1f}"]
        for r in found["rows"]
    ]  # fmt: skip
    head = [
        "model",
        "parameters",
        "T",
        "log p − bound, nats",
        "± sampling",
        "± Monte Carlo",
        "CPU minutes to fit",
    ]
    distances = [
        [name, f"{d['energy']:.3f}", f"{d['magnetisation']:.3f}"]
        for name, d in found["total_variation"].items()
    ]
    return (
        table(head, rows)
        + f"\nTotal variation from exact samples, {found['settings']['num_samples']:,} samples:\n\n"
        + table(["model", "energy", "magnetisation"], distances)
    )


def samplers(found):
    parts = []
    for name in ("digits", "mixture"):
        result = found[name]
        steps = list(dict.fromkeys(r["steps"] for r in result["rows"]))
        names = list(dict.fromkeys(r["sampler"] for r in result["rows"]))
        cells = {(r["sampler"], r["steps"]): thousandths(r) for r in result["rows"]}
        rows = [[s, *(cells[s, n] for n in steps)] for s in names]
        parts.append(
            f"Energy distance × 1000, {name}; between data and data {thousandths(result['floor'])}:\n\n"
            + table(["sampler", *(f"{n} calls" for n in steps)], rows)
        )
    costs = [[name, f"{ratio:.2f}"] for name, ratio in found["cost"].items()]
    parts.append(
        f"Time over that of the bare network calls, T = {found['cost_steps']}:\n\n"
        + table(["sampler", "ratio"], costs)
    )
    return "\n".join(parts)


def stress(found):
    head = ["fits", *found["outcomes"], "median, s", "slowest, s"]
    row = [
        found["fits"],
        *found["outcomes"].values(),
        f"{found['median_seconds']:.2f}",
        f"{found['slowest_seconds']:.1f}",
    ]
    return table(head, [row])


def sbi(found):
    rows = []
    for r in found["rows"]:
        scores = r.get("c2st", [])
        middle = sum(scores) / max(len(scores), 1)
        spread = (sum((s - middle) ** 2 for s in scores) / max(len(scores) - 1, 1)) ** 0.5
        kl = "{:.4f} ± {:.4f}".format(*r["kl"]) if "kl" in r else "–"
        npe = "{:.3f} ± {:.3f}".format(*r["npe"]) if r["npe"] else "–"
        rows.append([
            r["task"].replace("_", " "), f"{r['simulations']:,}",
            f"{middle:.3f} ± {spread:.3f}, {len(scores)}" if scores else "–", npe,
            f"{r['bound']['value']:.3f} ± {r['bound']['sampling_error']:.3f}", kl, f"{r['fit_seconds']:.0f}",
        ])  # fmt: skip
    head = ["task", "simulations", "C2ST, mean ± sd, observations", "NPE, published", "bound, nats",
            "KL(exact ‖ q), nats", "s to fit"]  # fmt: skip
    return table(head, rows)


def posterior(found):
    guidance, corrected, exact = "uncorrected guidance", "posterior_samples", "exact draws"
    gaussian = [
        [name, f"{max(map(abs, r['mean_z'])):.1f}", f"{max(map(abs, r['variance_errors'])):.1%}",
         f"{r['error']:+.5f} ± {r['standard_error']:.5f}" if "error" in r else "none"]
        for name, r in found["gaussian"]["rows"].items()
    ]  # fmt: skip
    head = ["Gaussian", "worst mean, in its errors", "worst variance", "error of log p(y), nats"]
    parts = [table(head, gaussian)]
    groups, rows = {}, found["rows"]
    for r in rows:
        groups.setdefault((r["d"], r["dy"]), []).append(r)
    lines = []
    for (d, dy), group in groups.items():
        floor = [r["distance"][exact][0] for r in group]
        ratios = [
            [r["distance"][m][0] / f for r, f in zip(group, floor, strict=True)]
            for m in (corrected, guidance)
        ]
        modes = [
            f"{median(r['modes'][m][0] for r in group):.3f}" for m in (corrected, guidance, exact)
        ]
        lines.append([
            d, dy, len(group), f"{max(abs(r['error']) for r in group):.3f}",
            f"{sum(abs(r['z']) <= 3 for r in group)} of {len(group)}",
            f"{min(r['least_ess'] / r.get('num_particles', found['num_particles']) for r in group):.0%}",
            f"{sum(r['reliable'] for r in group)} of {len(group)}",
            *(f"{median(q):.2f} ({min(q):.2f} to {max(q):.2f})" for q in ratios), *modes,
        ])  # fmt: skip
    if lines:
        head = ["d", "d_y", "problems", "largest error of log p(y), nats", "within 3 of its errors",
                "least ESS by timestep", "called reliable", "distance / that of exact draws, median (range)",
                "the same, uncorrected guidance", "distance of mode weights, median",
                "the same, uncorrected guidance", "the same, exact draws"]  # fmt: skip
        ours, theirs = found["ends"]
        parts.append(
            f"Mixtures. At T a component is at most {ours:.4f} nats from N(0, I) in KL at d = 80; with "
            f"the authors' schedule {theirs:.2f}:\n\n" + table(head, lines)
        )
    seen = sorted((r for r in rows if (r["d"], r["seed"]) == (8, 27)), key=lambda r: r["dy"])
    if seen:
        methods = [
            [f"{name}, published", *("{:.3g} ± {:.2g}".format(*by[str(r["dy"])]) for r in seen)]
            for name, by in found["published"].items()
        ]
        methods += [
            [name, *("{:.3g} ± {:.2g}".format(*r["of_a_tenth"][name]) for r in seen)]
            for name in (guidance, corrected, exact)
        ]
        head = ["method", *(f"d_y = {r['dy']}" for r in seen)]
        parts.append("Max-sliced distance of 1,000 draws, seed 27:\n\n" + table(head, methods))
    every = [
        [r["d"], r["dy"], r["seed"], f"{r['exact']:.3f}", f"{r['error']:+.4f} ± {r['standard_error']:.4f}",
         *("{:.3f} ± {:.3f}".format(*r["distance"][m]) for m in (corrected, guidance, exact))]
        for r in rows
    ]  # fmt: skip
    if every:
        head = ["d", "d_y", "seed", "log p(y)", "error", "distance", "uncorrected", "exact draws"]
        parts.append(f":::{{dropdown}} Every problem\n{table(head, every)}:::")
    return "\n".join(parts)


def flow(found):
    def worst(values):
        return max(map(abs, values))

    def split(name):
        return name.rsplit(", ", 1)

    orders = [
        [name, *(f"{r['mean']:.5f} ({r['max']:.4f})" for r in part["rows"]),
         *(f"{o['mean']:.2f} ({o['max']:.2f})" for o in part["order"].values())]
        for name, part in found["order"].items()
    ]  # fmt: skip
    first = next(iter(found["order"].values()))
    head = ["density", *(f"{r['num_steps']} steps" for r in first["rows"]),
            *(f"order, {ends}" for ends in first["order"])]  # fmt: skip
    parts = [
        "Error of `log_prob` from that of the ODE, nats, mean (largest):\n\n" + table(head, orders)
    ]
    joint = found["joint"] | found["data sets"]
    lines = [
        [*split(name), by, f"{worst(r['mean_errors']):.3f}", f"{worst(r['sd_errors']):.1%}",
         f"{r['ess']:.0f}" if "ess" in r else "–", f"{r['seconds']:.0f}" if "seconds" in r else "–"]
        for name, part in joint.items() for by, r in part["rows"].items()
    ]  # fmt: skip
    head = ["read", "run", "by", "worst mean, posterior sds", "worst sd", "ESS", "s"]
    kept = [line for line in lines if "steps" in line[1]]
    parts.append("x and log σ against a grid:\n\n" + table(head, kept))
    others = [line for line in lines if "steps" not in line[1]]
    parts.append(f":::{{dropdown}} Five data sets by SVI, ten steps\n{table(head, others)}:::\n")
    lines = [
        [*split(name), f"{part['exact']['log_evidence']:.4f}",
         f"{e['error']:+.4f} ± {e['standard_error']:.4f}", f"{e['error_of_steps']:+.4f}",
         f"{e['ess']:,.0f}", f"{e['pareto_k']:.2f}", "yes" if e["reliable"] else "no"]
        for name, part in joint.items() for e in [part["evidence"]]
    ]  # fmt: skip
    head = ["read", "run", "log p(y)", "error of the guide's weights, nats", "of the steps", "ESS of 10,000",
            "k̂", "called reliable"]  # fmt: skip
    parts.append("log p(y) from the guide of SVI:\n\n" + table(head, lines))
    lines = [
        [*split(name), side, f"{r['error']:+.3f} ± {r['standard_error']:.3f}", f"{r['pareto_k']:.2f}",
         "yes" if r["reliable"] else "no", f"{r['right']:.3f}", f"{r['right_weighted']:.3f}",
         f"{part['exact']['right']:.3f}"]
        for name, part in found["modes"].items() for side, r in part["rows"].items()
    ]  # fmt: skip
    head = ["modes", "run", "started", "error of log p(y), nats", "k̂", "called reliable",
            "P(x_0 > 0) by the guide", "weighted", "exact"]  # fmt: skip
    parts.append("A guide of one Gaussian on two modes:\n\n" + table(head, lines))
    lines = [
        [by, f"{worst(r['mean_errors'][:-1]):.3f}", f"{worst(r['sd_errors']):.1%}",
         f"{r['mean'][-1]:.3f} ({part['exact']['mean'][-1]:.3f})",
         f"{r['seconds_per_1000']:.0f}" if "seconds_per_1000" in r else "–"]
        for part in found["twelve"].values() for by, r in part["rows"].items()
    ]  # fmt: skip
    head = ["by", "worst mean of x", "worst sd", "log σ (exact)", "s for 1,000 iterations"]
    parts.append("Twelve dimensions, ten steps:\n\n" + table(head, lines))
    return "\n".join(parts)


def autoguide(found):
    parts = [f"{found['seconds']:.0f} seconds for each run; median (range) over seeds; nats."]
    for target, known in found["references"].items():
        rows = [r for r in found["rows"] if r["target"] == target]
        guides = dict.fromkeys(r["guide"] for r in rows)
        lines = [_guide([r for r in rows if r["guide"] == guide], known) for guide in guides]
        head = [
            "guide", "bound", "log Z" if known["log_z"] is None else "error of log Z", "its own error",
            "Pareto k", "ESS, %", "worst mean, sds", "worst sd, ratio", "modes, distance of their weights",
            "gain over the fitted base", "steps", "runs of the model",
        ]  # fmt: skip
        title = f"**{target}**"
        title += "" if known["log_z"] is None else f", log Z = {known['log_z']:.4f}"
        if "nuts" in known:
            title += f". NUTS from one start finds {known['nuts']['modes']} of 40 modes."
        if lines:
            parts.append(f"{title}\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def _guide(rows, known):
    """A row of the table: a guide's runs with different seeds."""

    def over(read, form):
        values = [read(r) for r in rows]
        low, high = (form.format(value) for value in (min(values), max(values)))
        return form.format(median(values)) + (f" ({low} to {high})" if low != high else "")

    chosen = sorted({str(r.get("transforms") or r.get("base", "")) for r in rows} - {""})
    name, first = rows[0]["guide"].split(",")[0], rows[0]
    notes = f", {' or '.join(chosen)}" if chosen else ""
    notes += " transforms" if "transforms" in first else ""
    exact = known["log_z"]
    error = (sum(r["log_z_error"] ** 2 for r in rows) / len(rows)) ** 0.5
    modes = ("modes", "distance")
    return [
        f"`{name}`{notes}", over(lambda r: r["bound"], "{:.3f}"),
        over(lambda r: r["log_z"] - (exact or 0.0), "{:.3f}" if exact is None else "{:+.3f}"),
        f"{error:.2g}", over(lambda r: r["pareto_k"], "{:.2f}"), over(lambda r: 100 * r["ess"], "{:.1f}"),
        *(over(lambda r, key=key: r[key], "{:.2f}") for key in ("mean_error", "sd_ratio")),
        "; ".join(over(lambda r, key=key: r[key], "{:.3g}") for key in modes) if "modes" in first else "–",
        over(lambda r: r["gain"][0], "{:+.3f}") if "gain" in first else "–",
        f"{median(r['steps'] for r in rows):,.0f}", f"{median(r['gradients'] for r in rows):,.0f}",
    ]  # fmt: skip


def parity(found):
    values = sum(len(q["values"]) for q in found["quantities"].values())
    return (
        f"The reference holds {values:,} numbers of {len(found['quantities'])} quantities, of commit "
        f"`{found['commit']}`.\n"
    )


def fit(found):
    speed = found["speed"]
    low, high = speed["range"]
    parts = [
        f"A step of `fit` takes {speed['ratio']:.2f} ({low:.2f} to {high:.2f}) times as long as a step by "
        f"hand (aim: ≤ {speed['target']:.1f}), {speed['milliseconds']:.2f} ms.\n",
        table(
            ["data", "`fit` ahead of the loop by hand, nats per datum"],
            [
                [r["data"], f"{r['ahead']['value']:.3f} ± {r['ahead']['error']:.3f}"]
                for r in found["hand"]
            ],
        ),
        table(
            ["data", "defaults, nats", "best by hand", "behind, nats per dimension", "within the aim"],
            [
                [r["data"], _pair(r["bounds"]["defaults"]),
                 f"{_pair(r['bounds'][r['best_by_hand']])}, {r['best_by_hand']}",
                 f"{r['behind_per_dim']:.4f} ± {r['error_per_dim']:.4f}", "yes" if r["within"] else "no"]
                for r in found["defaults"]
            ],
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def _pair(mean):
    return f"{mean['value']:.3f} ± {mean['error']:.3f}"


#: The sections of the page, the benchmarks in each, and how their numbers become a table.
TABLES = {
    "Speed and memory": [speed, evidence, memory_map, paired],
    "Are the errors honest?": [honesty, calibration, smc],
    "Bounds and schedules": [lengths, variance],
    "Densities that are known": [toys, heartbeat, ising],
    "Samples": [samplers, sbi, posterior, flow],
    "Guides": [autoguide],
    "Training": [fit],
    "Robustness": [stress, parity],
}


def benchmarks():
    """The page: every file of results, in the order of ``TABLES``, then those that are in no section."""
    parts = [
        "# Benchmarks\n\nEvery table and picture on this page is made at build time from the JSON files in "
        "`benchmarks/results`.\nEach script of `benchmarks/` writes its file there, with the settings of the "
        "run. The heading's command runs it again."
    ]
    listed = {shown.__name__ for section in TABLES.values() for shown in section}
    others = [path.stem for path in sorted(RESULTS.glob("*.json")) if path.stem not in listed]
    for title, section in TABLES.items():
        parts.append(f"## {title}")
        parts += [_benchmark(shown.__name__, shown) for shown in section]
    if others:
        parts += ["## Further benchmarks", *(_benchmark(name, plain) for name in others)]
    return "\n\n".join(parts) + "\n"


def _benchmark(name, shown):
    found = json.loads((RESULTS / f"{name}.json").read_text())
    script = BENCHMARKS / f"{name.removesuffix('_cuda')}.py"
    title, story = _story(script)
    keys = ("torch", "threads", "device", "processor", "seed")
    settings = ", ".join(f"{key} {found[key]}" for key in keys if key in found)
    pictures = "\n\n".join(
        f"```{{image}} ../benchmarks/results/{path.name}\n:alt: {title}\n```"
        for path in sorted(RESULTS.glob(f"{name}*.png"))
    )
    parts = [
        f"### {script.name}", f"**{title}**", f"```console\n$ python benchmarks/{script.name}\n```",
        shown(found).rstrip(), pictures, f"Settings: {settings}.",
        f":::{{dropdown}} What is measured, and how\n{story}\n:::",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _story(script):
    """The first line and the rest of a script's docstring as Markdown, without commands and references."""
    text = ast.get_docstring(ast.parse(script.read_text()))
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text).replace("``", "`")
    title, *paragraphs = text.split("\n\n")
    kept = [p for p in paragraphs if not p.startswith(("    ", "References:"))]
    return title, "\n\n".join(kept)


def plain(found):
    """The rows of a file that has no table of its own, scalars only."""
    rows = found.get("rows", [])
    if not rows or not isinstance(rows, list):
        return ""
    keys = [key for key, value in rows[0].items() if not isinstance(value, (dict, list))]
    return table(
        [key.replace("_", " ") for key in keys], [[_cell(r.get(key)) for key in keys] for r in rows]
    )


def _cell(value):
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else value


def length(num_timesteps):
    """The number of timesteps as a word of the table."""
    text = str(num_timesteps)
    return "∞" if text in ("inf", "infinity", "Infinity") else text.replace("None", "–")


def thousandths(e):
    return f"{1e3 * e['value']:.1f} ± {1e3 * e['standard_error']:.1f}"


def table(head, rows):
    """A Markdown table; a sign stays on the line of its number."""
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"
    return re.sub(r"([≤±]) ", "\\1\N{NO-BREAK SPACE}", text)
