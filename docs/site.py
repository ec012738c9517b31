# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs (mkdocs.yml): what lies outside docs/ and is a page of the site all the same. README is
its first page, bench/README.md one of its pages; links between them and docs/ are followed."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

TOP = Path(__file__).parents[1]
PAGES = {"index.md": TOP / "README.md", "bench.md": TOP / "bench" / "README.md"}
LINKS = {
    "index.md": (
        (r"\]\(docs/recipes/\)", "](recipes/qemu.md)"),
        (r"\]\(docs/", "]("),
        (r"\[([^\]]*)\]\(LICENSE\)", r"\1"),
    ),
    "bench.md": ((r"\]\(\.\./docs/", "]("), (r"\]\(\.\./README\.md", "](index.md")),
}


def on_files(files: Files, config: Any) -> Files:
    for name, source in PAGES.items():
        text = source.read_text()
        for pattern, instead in LINKS[name]:
            text = re.sub(pattern, instead, text)
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../bench/README.md", "](bench.md").replace("](../README.md", "](index.md")
