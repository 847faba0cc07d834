"""Draw the floors of the package from its imports: ``python docs/floors.py`` writes ``docs/floors.svg``.

A room is a file or a folder of ``pyro_diffusion``. Its floor is one above the highest room that it imports,
so that every import goes down. A line that follows from others is left out.
"""

import ast
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyro_diffusion"
PICTURE = ROOT / "docs/floors.svg"

#: What a room is for, which is its colour.
KINDS = {
    "the ground: arguments, names, versions": (
        "#e4e4e4", "checks display style distributions params arviz_bridge moved typed",
    ),
    "idea 1: the forward process": ("#cfe3f7", "schedules processes"),
    "what is learned, and the data's own units": (
        "#dcefd8", "transforms likelihoods networks encoders denoisers",
    ),
    "idea 2: the programs, and their time": ("#f9dcc4", "chains family diffusion hvae"),
    "ideas 3, 4 and 5: the walk, the score, what goes with the data": (
        "#f6e7a8", "walk scoring given reading",
    ),
    "what reads, samples, trains and shows them": (
        "#e3d7f0", "bounds evidence samplers training diagnostics inference plots",
    ),
}  # fmt: skip


def imports():
    """For each room the rooms that it imports, sorted."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room not in ("__init__", "__main__"):
            found.setdefault(room, set()).update(_imported(ast.parse(path.read_text())))
    return {room: sorted(found[room] - {room}) for room in sorted(found)}


def _imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_diffusion"):
            if node.module == "pyro_diffusion":  # from pyro_diffusion import a_room
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.split(".")[1]


def floors(imported):
    """Rooms from the ground floor upwards, a list for each floor."""
    height = {}

    def height_of(room):
        if room not in height:
            height[room] = 1 + max(map(height_of, imported[room]), default=-1)
        return height[room]

    highest = max(map(height_of, imported))
    return [[room for room in imported if height[room] == i] for i in range(highest + 1)]


def needless(room, imported):
    """Rooms that a room imports and reaches through another one as well, whose lines are left out."""
    reached = set()
    for other in imported[room]:
        reached |= set(imported[other]) | needless(other, imported)
    return reached


def draw(imported):
    """The picture: a row for each floor, an arrow from a room down to each that it stands on."""
    lines = {room: set(imported[room]) - needless(room, imported) for room in imported}
    rows = floors(imported)
    colours = {room: c for c, rooms in KINDS.values() for room in rooms.split()}
    width = max(map(len, rows))
    middle = {}
    for y in reversed(range(len(rows))):

        def above(room):
            """The mean place of the rooms whose arrows come down to this one."""
            places = [x for other, (x, _) in middle.items() if room in lines[other]]
            return sum(places) / len(places) if places else width

        for i, room in enumerate(sorted(rows[y], key=above)):
            middle[room] = (width * (i + 0.5) / len(rows[y]), y)
    figure, ax = plt.subplots(figsize=(1.75 * width, 0.95 * len(rows) + 1.6), layout="constrained")
    for room, (x, y) in middle.items():
        for other in sorted(lines[room]):
            to = middle[other]
            arrow = {"arrowstyle": "-|>", "color": "#777777", "shrinkA": 0, "shrinkB": 0, "lw": 0.9}
            ax.annotate("", (to[0], to[1] + 0.22), (x, y - 0.22), arrowprops=arrow, zorder=1)
        box = plt.Rectangle(
            (x - 0.42, y - 0.22), 0.84, 0.44, fc=colours.get(room, "white"), ec="#444444", zorder=2
        )
        ax.add_patch(box)
        ax.text(x, y, room, ha="center", va="center", fontsize=12, zorder=3)
    handles = [
        plt.Rectangle((0, 0), 1, 1, fc=c, ec="#444444", label=k) for k, (c, _) in KINDS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    ax.set(xlim=(0, width), ylim=(-0.4, len(rows) - 0.6))
    ax.axis("off")
    return figure


if __name__ == "__main__":
    found = imports()
    plt.rcParams["svg.hashsalt"] = "floors"
    about = {"Description": json.dumps(found), "Date": None}
    draw(found).savefig(PICTURE, metadata=about)
