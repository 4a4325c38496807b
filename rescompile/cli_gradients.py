"""`--gradients` of `inspect` and `rewrite`: data in, gradient flow out, as text, JSON and pictures."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rescompile.arrays import Arrays, load_arrays
from rescompile.blocks import Report
from rescompile.cli_files import check_writable, write_whole
from rescompile.cli_output import html_page
from rescompile.errors import RescompileError
from rescompile.gradient_comparison import GradientComparison
from rescompile.gradients import GradientFlow
from rescompile.graph import Graph
from rescompile.rewriting import Result


class Flow:
    """What the command line asks for, checked before anything long begins; then what was found, or the refusal."""

    def __init__(self, input_file: Path | None, plot: Path | None) -> None:
        self.data: Arrays | None = None if input_file is None else load_arrays(input_file)
        self.plot = plot
        self.found: GradientFlow | None = None
        self.refusal: RescompileError | None = None
        if plot is not None:
            self.format = _check_plot(plot)

    def measure(self, graph: Graph, report: Report) -> None:
        """Run the two passes, and draw the picture. A refusal is kept: the report is printed all the same."""
        from rescompile.fx_gradients import measure

        try:
            self.found = measure(graph, report, self.data)
        except RescompileError as error:
            self.refusal = error
            return
        if self.plot is not None:
            from rescompile.plots import draw

            picture = draw(self.found, self.format)
            write_whole(self.plot, lambda part: part.write_bytes(picture))

    def to_dict(self, report: Report) -> dict[str, Any]:
        """The report's JSON with the flow under "gradients", or the reason why there is none."""
        found = {"refused": str(self.refusal)} if self.found is None else self.found.to_dict()
        return {**report.to_dict(), "gradients": found}

    def html(self, report: Report, title: str) -> str:
        """The report's page with the flow's table and, where matplotlib is installed, its picture."""
        page = html_page(report, title)
        if self.found is None:
            return page
        table = html_page(self.found, title)
        table = table[table.index("<body>") + len("<body>") : table.index("</body>")]
        picture = ""
        if self.found.blocks and find_spec("matplotlib") is not None:
            from rescompile.plots import draw

            svg = draw(self.found, "svg").decode()
            picture = svg[svg.index("<svg") :]
        return page.replace("</body>", f"{table}{picture}\n</body>", 1)


class Comparison:
    """The same for a rewrite: gradient flow before and after. `init`: "given" or "xavier"."""

    def __init__(self, input_file: Path | None, plot: Path | None, init: str) -> None:
        self.data: Arrays | None = None if input_file is None else load_arrays(input_file)
        self.plot = plot
        self.init = init
        self.found: GradientComparison | None = None
        self.refusal: RescompileError | None = None
        if plot is not None:
            self.format = _check_plot(plot)

    def measure(self, result: Result) -> None:
        """Run both graphs, and draw the picture. A refusal is kept: what the rewrite did is printed all the same."""
        try:
            self.found = result.compare_gradients(self.data, init=self.init)
        except RescompileError as error:
            self.refusal = error
            return
        if self.plot is not None:
            from rescompile.plots import draw_comparison

            picture = draw_comparison(self.found, self.format)
            write_whole(self.plot, lambda part: part.write_bytes(picture))

    def to_dict(self, result: Result) -> dict[str, Any]:
        """The result's JSON with the comparison under "gradients", or the reason why there is none."""
        found = {"refused": str(self.refusal)} if self.found is None else self.found.to_dict()
        return {**result.to_dict(), "gradients": found}


def _check_plot(plot: Path) -> str:
    """The picture's format; RescompileError or ModuleNotFoundError where it could not be written."""
    from rescompile.plots import format_of

    format_ = format_of(plot)
    check_writable(plot)
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    return format_
