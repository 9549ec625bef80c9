"""Writes the tables of docs/latency.md from what lies in `benchmarks/results/<device>`.

python benchmarks/latency_page.py benchmarks/results/amd-epyc-avx-512
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import budgets
import latency_prediction
import realisation

PAGE = Path(__file__).parents[1] / "docs" / "latency.md"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    folder = parser.parse_args().results
    tables = {
        "prediction": latency_prediction.table(folder / "latency-prediction"),
        "budgets": budgets.table(lines(folder / "budgets.jsonl")),
        "realisation": realisation.table(lines(folder / "realisation.jsonl")),
    }
    text = PAGE.read_text()
    for name, table in tables.items():
        block = f"<!-- {name}:begin -->\n{folder.name}:\n\n{table}\n<!-- {name}:end -->"
        text, found = re.subn(
            rf"<!-- {name}:begin -->.*?<!-- {name}:end -->", lambda _, b=block: b, text, flags=re.DOTALL
        )
        assert found == 1, name
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
