"""Straighten a pose graph: read or make one, solve it, and draw the path before and after.

python examples/pose_graph.py                                  # a synthetic sphere
python examples/pose_graph.py --file sphere2500.txt --figure sphere.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import torch
from synthetic_graphs import sphere_graph

from jacops._extras.graph_files import read_g2o, read_toro
from jacops._extras.graph_problems import PoseGraph
from jacops.charts import SE2
from jacops.fit import LeastSquaresResult, levenberg_marquardt


def solved(graph: PoseGraph) -> LeastSquaresResult:
    """Return the fit of all poses but those that stay where they are: what the file fixes, or the first one."""
    return levenberg_marquardt(
        graph.residual(),
        manifolds={"poses": graph.chart},
        weight=graph.weights,
        fixed={"poses": graph.anchors},
        ftol=None,
        xtol=None,
        gtol=1e-6,
    )


def draw(graph: PoseGraph, after: torch.Tensor, costs: tuple[float, float], file: Path) -> None:
    """Write a figure with the path before and after, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    flat = graph.chart is SE2
    figure = plt.figure(figsize=(11, 5.5), layout="constrained")
    closures = (graph.target - graph.source).abs() > 1
    for i, (poses, title) in enumerate(((graph.poses, "initial guess"), (after, "solved"))):
        axes = figure.add_subplot(1, 2, i + 1, projection=None if flat else "3d")
        at = poses[:, : 2 if flat else 3]
        ties = torch.stack([at[graph.source[closures]], at[graph.target[closures]]], 1)
        _lines(axes, ties.numpy(), flat)
        axes.plot(*at.T.numpy(), color="#1f5fa8", linewidth=0.9)
        axes.set_title(f"{title}: objective {costs[i]:.4g}")
        axes.set_xlabel("x (units of the file)")
        axes.set_ylabel("y")
        axes.set_aspect("equal")
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _lines(axes, pairs, flat: bool) -> None:  # noqa: ANN001
    from matplotlib.collections import LineCollection
    from mpl_toolkits.mplot3d.art3d import Line3DCollection

    kind = LineCollection if flat else Line3DCollection
    axes.add_collection(kind(pairs, colors="#d1813a", linewidths=0.4, alpha=0.5))


def main(arguments: list[str] | None = None) -> LeastSquaresResult:
    """Solve, print the steps, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--file", type=Path, help="a TORO (.txt, .graph) or g2o (.g2o) file; a synthetic sphere without"
    )
    parser.add_argument("--figure", type=Path, default=Path("pose_graph.png"), help="where the figure goes")
    options = parser.parse_args(arguments)
    read = read_g2o if options.file and options.file.suffix == ".g2o" else read_toro
    graph = read(options.file) if options.file else sphere_graph(20, 40, noise=0.03)
    started = perf_counter()
    fit = solved(graph)
    print(graph, f"solved in {perf_counter() - started:.1f} s", fit, sep="\n")
    draw(graph, fit.x["poses"], (fit.log[0].objective, fit.cost), options.figure)
    print(f"figure: {options.figure}")
    return fit


if __name__ == "__main__":
    main()
