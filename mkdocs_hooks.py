"""Additions to mkdocs: pages from outside docs/, mathematics as MathML, docstrings as Markdown, the CLI.

Links are written for the repository, so that its files also read well on a code host, and are rewritten for the site
here. A file outside docs/ that a page links to becomes part of the site, under its path in the repository.
"""

from __future__ import annotations

import argparse
import html
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
OUTSIDE = ("bench/RESULTS*.md", "bench/LOG.md", "CONTRIBUTING.md", "CHANGELOG.md")  # pages outside docs/
LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)((?:#[^)]*)?)\)")


# Pages


def on_config(config: MkDocsConfig) -> None:
    """Expand navigation entries that end in a slash to the pages of that folder."""
    for section in config.nav:
        for title, entry in section.items():
            if isinstance(entry, str) and entry.endswith("/"):
                section[title] = [f"{entry}{path.name}" for path in sorted((ROOT / "docs" / entry).glob("*.md"))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, all files that any page links to, and the page of the command line."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        files.append(_copied(path, config))
    files.append(File.generated(config, "cli.md", content=command_line()))
    for page in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(_without_code(page.content_string)):
            path = (ROOT / posixpath.join(posixpath.dirname(_place_in_repository(page.src_uri)), target)).resolve()
            if path.is_file() and path.relative_to(ROOT).parts[0] != "docs" and path.name != "README.md":
                if not files.get_file_from_path(path.relative_to(ROOT).as_posix()):
                    files.append(_copied(path, config))
    return files


def _copied(path: Path, config: MkDocsConfig) -> File:
    return File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))


def _place_in_repository(src_uri: str) -> str:
    """Path in the repository of a page of the site."""
    return f"docs/{src_uri}" if (ROOT / "docs" / src_uri).exists() else src_uri


def _without_code(markdown: str) -> str:
    return re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    markdown = _with_site_links(markdown, uri, _place_in_repository(uri), files)
    if uri == "index.md":  # starts like the README
        opening, _, _ = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")
        markdown = _with_site_links(opening, uri, "README.md", files) + "\n\n" + markdown.partition("\n")[2]
        page.meta["hide"] = ["navigation", "toc"]
    if uri == "api/integrations.md":
        names = sorted(path.stem for path in (ROOT / "src/pomona/integrations").glob("[a-z]*.py"))
        markdown += "".join(f"\n\n## pomona.integrations.{name}\n\n{_members(name)}" for name in names)
    if uri.startswith("methods/"):
        source = (ROOT / "src/pomona" / uri).with_suffix(".py").read_text(encoding="utf-8")
        (name,) = re.findall(r"^class (\w+)\((?:Method|DropAndGrow)\)", source, flags=re.MULTILINE)
        markdown += f"\n\n## Reference\n\n::: pomona.{name}\n    options:\n      heading_level: 3\n"
    return markdown


def _members(name: str) -> str:
    """Reference of a module in pomona.integrations, under an existing heading."""
    options = "show_root_heading: false\n      show_root_toc_entry: false\n      heading_level: 3"
    return f"::: pomona.integrations.{name}\n    options:\n      {options}\n"


def _with_site_links(markdown: str, uri: str, place: str, files: Files) -> str:
    """Rewrite relative links of the file at ``place`` in the repository for the page at ``uri`` of the site."""

    def moved(match: re.Match[str]) -> str:
        shown, target, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        inside = "index.md" if target == "README.md" else target.removeprefix("docs/")
        there = files.get_file_from_path(inside)
        if shown.endswith(".md") and there and there.page and there.page.title:
            shown = there.page.title  # more useful here than a file name
        return f"[{shown}]({posixpath.relpath(inside, posixpath.dirname(uri) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


# Mathematics


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert LaTeX to MathML, which browsers show without a script."""

    def inline(match: re.Match[str]) -> str:
        return mathml(html.unescape(match[1]), "inline")

    def block(match: re.Match[str]) -> str:
        return f'<div class="math">{mathml(html.unescape(match[1]), "block")}</div>'

    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', block, content, flags=re.DOTALL)


def mathml(latex: str, display: str) -> str:
    """Convert one formula; lines that end in two backslashes are aligned at their ampersands."""
    latex = latex.replace("{aligned}", "{align*}")  # latex2mathml does not know aligned
    if r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{align*}}{latex}\end{{align*}}"
    made = convert(" ".join(latex.split()), display=display)
    if unknown := re.findall(r"<m[ion]>(?:\\\w+|&|&amp;)</m[ion]>", made):
        raise PluginError(f"latex2mathml does not know {unknown[0]} in {latex}")
    return made


# Docstrings


class PlainDocstrings(griffe.Extension):
    """Convert docstrings, which use some reStructuredText for terminals and editors, to Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown_of(obj.docstring.value, obj)


def markdown_of(docstring: str, obj: griffe.Object) -> str:
    """Convert roles to links and mathematics, ``::`` to a colon, an example to the section that mkdocstrings knows."""

    def formula(match: re.Match[str]) -> str:
        indent, body = match[1], textwrap.dedent(match[2]).strip()
        return textwrap.indent(f"\n$$\n{body}\n$$\n", indent) + "\n"

    def reference(match: re.Match[str]) -> str:
        path = match[2].lstrip("~")
        shown = path.rpartition(".")[2] if match[2].startswith("~") else path
        return f"[`{shown}`][{_full_path(path, obj)}]"

    def references(match: re.Match[str]) -> str:
        return f"**References:**\n\n{textwrap.dedent(match[1])}"

    text = re.sub(r"^( *)\.\. math::\n((?:\1 +\S.*\n?|\n)+)", formula, docstring, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", lambda match: f"${' '.join(match[1].split())}$", text)
    text = re.sub(r":(class|func|meth|mod|attr):`([^`]+)`", reference, text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(
        r"^References:\n((?: {4}.*\n?)+)", lambda m: f"**References:**\n\n{textwrap.dedent(m[1])}", text, flags=re.M
    )


def _full_path(path: str, obj: griffe.Object) -> str:
    if path.startswith(("pomona.", "torch.")):
        return path
    first, dot, rest = path.partition(".")
    return obj.resolve(first) + dot + rest


# The command line


def command_line() -> str:
    """Build the page of all commands and options from argparse."""
    from pomona.cli import parser

    top = parser()
    (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    lines = ["# Command line", "", top.description or "", "", "| command | |", "| --- | --- |"]
    lines += [f"| [`pomona {one.dest}`](#pomona-{one.dest}) | {one.help} |" for one in commands._choices_actions]
    for name, command in commands.choices.items():
        lines += ["", f"## pomona {name}", "", command.description or "", "", "```text", command.format_usage()]
        lines += ["```", ""]
        described = [a for a in command._actions if not isinstance(a, argparse._HelpAction)]
        if described:
            lines += ["| argument | |", "| --- | --- |", *map(_row, described)]
    return "\n".join(lines)


def _row(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if action.choices is not None and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    shown = (
        f"{', '.join(action.option_strings)} {value}".strip() if action.option_strings else str(value or action.dest)
    )
    said = argparse.HelpFormatter("pomona")._expand_help(action) if action.help else ""
    cells = (f"`{shown}`", re.sub(r"`([^`]*)`|([<>*_])", lambda m: m[0] if m[1] else f"\\{m[2]}", said))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
