"""Reading a single source as the data stage does, for tests of what sources may be."""

from instructrl.config import Data, Recipe, Source
from instructrl.stages import records, sources
from instructrl.stages.ingest import Reading, RowWork, entries


def read_source(source: Source, kind: str, key: str = "k") -> tuple[list[dict], Reading | None]:
    """(the records of one source, what was dropped and why). Of labels, which `eval` reads, records only."""
    if kind == "labels":
        rows = records.checked(sources.rows(source, key), kind, source, key)
        return [label for row in rows for label in records.record(row, kind, source, key)], None
    work = RowWork(Recipe(data={"text": [{"path": "t.txt"}], "pii_filter": False}, model={"path": None}))
    readings: list[Reading] = []
    parts = entries(Data(**{kind: [source.model_dump(exclude_unset=True)]}), work, readings)
    return [entry.record for part in parts for entry in part], readings[0]
