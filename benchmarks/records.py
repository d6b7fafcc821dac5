"""What benchmarks write down: JSON objects, one a line, each with a ``kind``. Knows no table and no server."""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OURS = "tgi"
PRECISIONS = ("32-bit", "16-bit", "8-bit", "4-bit")

Record = dict[str, Any]


class Journal:
    """Records on disk, one JSON object a line, each written at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records = _read(path) if path.exists() else []

    @property
    def data(self) -> "Data":
        """All that is there, also from earlier runs."""
        return Data(self._records)

    def write(self, kind: str, **figures: object) -> None:
        record = {"kind": kind, "at": time.strftime("%Y-%m-%d %H:%M:%S"), **figures}
        self._records.append(record)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as out:
            out.write(json.dumps(record) + "\n")
        shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in record.items()}
        print(json.dumps(shown), file=sys.stderr, flush=True)


class Data:
    """What was measured. Only clean cells count; where a server has none of a workload, the unclean ones do, and are
    marked."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = list(records)
        self.servers = list(dict.fromkeys(record["server"] for record in self.of("cell")))
        self.peers = [server for server in self.servers if server != OURS]
        self.precisions = [p for p in PRECISIONS if any(r["precision"] == p for r in self.of("cell"))]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "Data":
        return cls(record for path in paths for record in _read(path))

    def of(self, kind: str, **keys: object) -> list[Record]:
        """Records of a kind, with these values."""
        return [r for r in self._records if r["kind"] == kind and all(r[key] == value for key, value in keys.items())]

    def cells(self, server: str, precision: str, workload: str) -> list[Record]:
        found = self.of("cell", server=server, precision=precision, workload=workload)
        return [cell for cell in found if cell["clean"]] or found

    def values(self, kind: str, figure: str, **keys: object) -> list[float]:
        return [record[figure] for record in self.of(kind, **keys) if figure in record]

    def ceiling(self, cell: Record) -> Record | None:
        """The last that was measured before the cell."""
        found = None
        for record in self._records:
            if record is cell:
                break
            if record["kind"] == "ceiling":
                found = record
        return found

    def failures(self) -> list[Record]:
        """Errors of what was never measured."""
        return [e for e in self.of("error") if not self.cells(e["server"], e["precision"], e["workload"])]


def _read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]
