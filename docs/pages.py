"""Pages of the site that are made from other files of the repository: see ``conf.py``."""

import ast
import json
import os
import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
GALLERY = HERE / "gallery"

#: Files of the repository that are a page of the site under another name.
MOVED = {
    "CHANGELOG.md": "docs/development/changelog.md",
    "CONTRIBUTING.md": "docs/development/contributing.md",
    "docs/architecture.md": "docs/development/architecture.md",
    "docs/moved.md": "docs/development/moved.md",
    "docs/reading.md": "docs/guides/reading_the_bound.md",
}


def page(target):
    """The page of a file of the repository, from the folder ``docs``, or ``None`` if it has none."""
    target = MOVED.get(target, target)
    path = Path(target)
    if path.parts[0] == "pyro_diffusion":
        return f"api/{Path(path.parts[1]).stem}.md"  # a folder has one page
    if path.parts[0] == "examples":
        return f"gallery.md#{path.stem.replace('_', '-')}-py"
    if path.parts[0] == "docs" and (ROOT / path).exists():
        return target.removeprefix("docs/")
    return None


def from_repository(name, folder="."):
    """A file of the repository, for a page in ``folder``: links to other files become links to pages."""

    def link(match):
        text, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match.group()
        found = page(target)
        return f"[{text}]({os.path.relpath(found, folder)})" if found else text

    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link, (ROOT / name).read_text())


def gallery():
    """Every example: what it shows, its picture, its time, its output and its source."""
    found = json.loads((GALLERY / "gallery.json").read_text())
    examples = sorted((ROOT / "examples").glob("*.py"))
    cards = "\n".join(_card(path, found.get(path.stem, {})) for path in examples)
    sections = "\n".join(_section(path, found.get(path.stem, {})) for path in examples)
    return (
        "# Gallery\n\nEvery script of `examples/`, with its picture, its time and its source. Each takes "
        "`--device`, `--seed` and\n`--smoke`, which runs it on tiny settings in a few seconds. The pictures, "
        "the output and the times are written by\n`make gallery`.\n\n"
        f"::::{{grid}} 1 2 2 3\n:gutter: 3\n\n{cards}\n::::\n\n{sections}"
    )


def _story(path):
    """The first line of an example's docstring, and what follows up to its commands, as Markdown."""
    title, *others = ast.get_docstring(ast.parse(path.read_text())).split("\n\n")
    story = []
    for text in others:
        if text.startswith("    python "):
            break
        if text.startswith("    "):
            story.append(f"```text\n{text}\n```")
        else:
            story.append(re.sub(r":math:`([^`]+)`", r"$\1$", text).replace("``", "`"))
    return title.rstrip("."), "\n\n".join(story)


def _card(path, run):
    title, _ = _story(path)
    picture = f":img-top: gallery/{run['picture']}\n" if run.get("picture") else ""
    return (
        f":::{{grid-item-card}} {path.name}\n:link: example-{path.stem}\n:link-type: ref\n"
        f"{picture}\n{title}.\n:::\n"
    )


def _section(path, run):
    title, story = _story(path)
    parts = [f"(example-{path.stem})=\n## {path.name}", f"**{title}.**\n{story}"]
    if run.get("picture"):
        parts.append(f"```{{image}} gallery/{run['picture']}\n:alt: What {path.name} draws\n```")
    if run:
        parts.append(f"```console\n$ {run['command']}\n```")
        short = " A short run: without these options it takes longer and reaches more."
        given = short if run["command"].split()[2:] else ""
        parts.append(f"{run['seconds']:.0f} seconds on {run['machine']}.{given}")
        shown = ":open:\n" * (not run["picture"])  # where there is nothing else to look at
        parts.append(_dropdown("Output", f"gallery/{path.stem}.txt", "text", shown))
    parts.append(_dropdown("Source", f"../examples/{path.name}", "python"))
    return "\n\n".join(parts) + "\n"


def _dropdown(title, file, language, options=""):
    return f"""::::{{dropdown}} {title}
{options}
```{{literalinclude}} {file}
:language: {language}
```
::::"""
