"""One pool of prompts on disk: what is deduplicated, capped and split, however large, in a few megabytes of memory.

The pool is a SQLite file that lives as long as the data stage. Every decision is taken on hashes, in SQL, and never on
the order in which rows came: the same rows in another order give the same tables, byte for byte.

Terms. A row's *prompt* is its text without case and extra whitespace: 'Hi there' and 'hi  there' are one prompt, in
every kind of row. A *family* is the prompts made of one raw row (the K prompts of a few-shot example, the turns of one
conversation); any other prompt is a family of its own. A *unit* is what a split keeps together: a user with all that
they wrote, or else a family.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("demonstrations", "rankings", "prompts", "text")
CACHE_KB = 32 * 1024


def digest(*parts: str) -> bytes:
    """16 bytes that stand for the parts. Lone surrogates, which JSON may hold, count as they are."""
    return hashlib.blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=16).digest()


def normalized(text: str) -> str:
    """The text without what does not make it another prompt: case and whitespace."""
    return " ".join(text.split()).casefold()


def place(unit: bytes, seed: int | str) -> float:
    """The unit's place on [0, 1), from its hash and the seed."""
    hashed = hashlib.blake2b(unit, key=str(seed).encode()[:64], digest_size=7).digest()
    return int.from_bytes(hashed) / 2**56


@dataclass(frozen=True, slots=True)
class Entry:
    """A row on its way into the pool."""

    kind: str
    source: int
    """The number of its source."""
    record: dict
    """Columns of `stages.tables`."""
    family: bytes | None = None
    """Of the raw row that made several records."""
    personal: bool = False
    """The PII filter found something."""

    @property
    def text(self) -> str:
        return self.record["text" if self.kind == "text" else "prompt"]


@dataclass(frozen=True)
class Step:
    """What one step took out of the pool."""

    step: str
    says: str
    """What its rows have in common, to be read after their number."""
    key: str = ""
    """Of the recipe."""
    setting: object = None
    removed: dict[str, int] = field(default_factory=dict)
    """Rows by kind."""

    def card(self) -> dict:
        return dict(vars(self))


class Pool:
    """Rows, and which of them are still in.

    Args:
        file: where the database goes; it must not exist.
        seed: of every choice that is not the data's own.
    """

    def __init__(self, file: Path, seed: int) -> None:
        self.seed = seed
        self.steps: list[Step] = []
        self.database = sqlite3.connect(file, isolation_level=None)
        self.database.create_function("place", 1, lambda unit: place(unit, seed), deterministic=True)
        # Nothing here outlives the stage, so nothing has to survive a crash.
        settings = f"journal_mode=OFF; synchronous=OFF; cache_size=-{CACHE_KB}; temp_store=FILE; locking_mode=EXCLUSIVE"
        for setting in settings.split("; "):
            self.database.execute(f"PRAGMA {setting}")
        self.database.executescript("""
            CREATE TABLE rows (number INTEGER PRIMARY KEY, kind INT, source INT, id BLOB, prompt BLOB, prefix BLOB,
                               owner BLOB, family BLOB, user BLOB, personal INT, part TEXT, step INT);
            CREATE TABLE records (number INTEGER PRIMARY KEY, record TEXT);
        """)

    def close(self) -> None:
        self.database.close()

    # ---- filling ---------------------------------------------------------------------------------------------------

    def add(self, entries: Iterable[Entry], prefix: int = 0) -> int:
        """Put rows in; two prompts whose first `prefix` characters are equal share a prefix (0: none do)."""
        rows, records = [], []
        for entry in entries:
            body = json.dumps(entry.record, sort_keys=True)
            text = normalized(entry.text)
            shared = prefix and entry.kind != "text" and len(text) >= prefix
            user = entry.record.get("user") or ""
            rows.append((
                KINDS.index(entry.kind), entry.source, digest(entry.kind, body), digest(text),
                digest(text[:prefix]) if shared else None,
                digest("user", user) if user else entry.family, entry.family, digest("user", user) if user else None,
                entry.personal,
            ))  # fmt: skip
            records.append((body,))
        columns = "kind, source, id, prompt, prefix, owner, family, user, personal"
        self.database.execute("BEGIN")
        self.database.executemany(f"INSERT INTO rows ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        self.database.executemany("INSERT INTO records (record) VALUES (?)", records)
        self.database.execute("COMMIT")
        return len(rows)

    def gather(self) -> None:
        """Give every prompt its unit and family, once all rows are in: of several the smallest, whatever came first."""
        self.database.executescript("""
            CREATE TABLE prompts AS
                SELECT prompt, coalesce(min(owner), prompt) AS unit, coalesce(min(family), prompt) AS family,
                       min(prefix) AS prefix, NULL AS place
                FROM rows GROUP BY prompt;
            CREATE UNIQUE INDEX prompts_by_prompt ON prompts (prompt);
            UPDATE prompts SET place = place(unit);
        """)

    # ---- taking out ------------------------------------------------------------------------------------------------

    def remove(
        self, step: str, says: str, chosen: str, key: str = "", setting: object = None, **values: object
    ) -> Step:
        """Take out the rows whose `number` the SQL `chosen` selects among those that are `in`."""
        number = len(self.steps) + 1
        condition = f"step IS NULL AND number IN ({chosen})"
        self.database.execute(f"UPDATE rows SET step = {number} WHERE {condition}", values)
        counts = self.database.execute("SELECT kind, count(*) FROM rows WHERE step = ? GROUP BY kind", (number,))
        self.steps.append(Step(step, says, key, setting, {KINDS[kind]: count for kind, count in counts}))
        return self.steps[-1]

    def remove_repeated(self) -> Step:
        """Rows that are equal in all columns: one stays."""
        return self.remove(
            "repeated",
            "are the same as another row",
            "SELECT number FROM (SELECT number, row_number() OVER (PARTITION BY kind, id ORDER BY source, number) AS n "
            "FROM rows WHERE step IS NULL) WHERE n > 1",
        )

    def remove_other_owners(self) -> Step:
        """A prompt that several users wrote, or several conversations hold, belongs to one of them: rows of the others
        go. So a prompt's unit is certain, and no prompt crosses a split with its second user."""
        return self.remove(
            "other users",
            "have a prompt that belongs to another user or conversation",
            "SELECT number FROM rows JOIN prompts USING (prompt) WHERE owner IS NOT NULL AND owner != prompts.unit",
        )

    def remove_shared_prefixes(self, prefix: int) -> Step:
        """Of the prompts that share a long prefix one stays, with all its rows (paper, 3.2); its family stays whole.

        One comparison a prompt: equal beginnings have equal hashes, so sorting replaces comparing all with all.
        """
        return self.remove(
            "prefix",
            "share their beginning with a kept prompt",
            "SELECT number FROM rows JOIN prompts USING (prompt) JOIN (SELECT p.prefix AS shared, "
            "min(p.family) AS first FROM rows AS r JOIN prompts AS p USING (prompt) WHERE p.prefix IS NOT NULL "
            "AND r.step IS NULL GROUP BY p.prefix) ON prompts.prefix = shared WHERE prompts.family != first",
            "data.dedup_prefix",
            prefix,
        )

    def remove_above_cap(self, most: int) -> Step:
        """At most so many prompts a user (paper, 3.2: 200), over all kinds together."""
        return self.remove(
            "cap",
            "are beyond the most prompts that a user may have",
            "SELECT rows.number FROM rows JOIN (SELECT user AS u, prompt AS p, dense_rank() OVER (PARTITION BY user "
            "ORDER BY prompt) AS n FROM rows WHERE step IS NULL AND user IS NOT NULL) AS ranked "
            "ON rows.user = u AND rows.prompt = p WHERE n > :most",
            "data.max_prompts_per_user",
            most,
            most=most,
        )

    def remove_beyond_quotas(self, kind: str, quotas: dict[int, int]) -> Step:
        """So many rows of each source of a kind: the mixture that `weight` asks for."""
        cases = " ".join(f"WHEN {source} THEN {quota}" for source, quota in quotas.items())
        return self.remove(
            f"mix of {kind}",
            "are more than the source's weight allows",
            f"SELECT number FROM (SELECT number, source, row_number() OVER (PARTITION BY source ORDER BY id) AS n "
            f"FROM rows WHERE step IS NULL AND kind = {KINDS.index(kind)}) WHERE n > CASE source {cases} ELSE n END",
            f"data.{kind}[].weight",
        )

    def remove_same_prompts(self) -> Step:
        """Of the rows of `prompts` with one prompt one stays; a prompt may have several demonstrations and rankings."""
        return self.remove(
            "same prompt",
            "have a prompt that another row of prompts has",
            "SELECT number FROM (SELECT number, row_number() OVER (PARTITION BY prompt ORDER BY id) AS n "
            f"FROM rows WHERE step IS NULL AND kind = {KINDS.index('prompts')}) WHERE n > 1",
        )

    def remove_reserved(self, low: float, high: float) -> Step:
        """What is no ranking, of units in [low, high) whose rankings measure the reward model or train the judge."""
        return self.remove(
            "reserved",
            "belong to a user or prompt whose rankings measure the reward model or train the judge",
            "SELECT number FROM rows JOIN prompts USING (prompt) WHERE part IS NULL AND place >= :low "
            "AND place < :high AND unit IN (SELECT unit FROM rows JOIN prompts USING (prompt) WHERE step IS NULL "
            "AND kind = :rankings) AND kind IN (:demonstrations, :prompts)",
            low=low,
            high=high,
            **{kind: number for number, kind in enumerate(KINDS) if kind != "text"},
        )

    # ---- splitting -------------------------------------------------------------------------------------------------

    def count(self, kind: str, where: str = "1") -> int:
        sql = f"SELECT count(*) FROM rows JOIN prompts USING (prompt) WHERE kind = ? AND step IS NULL AND ({where})"
        return self.database.execute(sql, (KINDS.index(kind),)).fetchone()[0]

    def counts(self, kind: str, column: str) -> dict:
        """Rows that are in, by `source` or `part`."""
        sql = f"SELECT {column}, count(*) FROM rows WHERE kind = ? AND step IS NULL GROUP BY {column}"
        return dict(self.database.execute(sql, (KINDS.index(kind),)).fetchall())

    def move(self, kind: str, low: float, high: float) -> None:
        """See that the part [low, high) of the line has a row of the kind, if two units or more are beyond it.

        With ten rows and a share of .1, chance would leave it empty every third time. The unit nearest to it moves.
        """
        if low >= high or self.count(kind, f"place >= {low} AND place < {high}"):
            return
        beyond = self.database.execute(
            "SELECT DISTINCT unit FROM rows JOIN prompts USING (prompt) WHERE kind = ? AND step IS NULL AND place >= ? "
            "ORDER BY place, unit LIMIT 2",
            (KINDS.index(kind), high),
        ).fetchall()
        if len(beyond) == 2:
            self.database.execute("UPDATE prompts SET place = ? WHERE unit = ?", (low, beyond[0][0]))

    def assign(self, kind: str, part: str, low: float, high: float) -> None:
        """Rows of the kind whose unit lies in [low, high) are the part's."""
        self.database.execute(
            "UPDATE rows SET part = ? WHERE kind = ? AND step IS NULL AND part IS NULL AND prompt IN "
            "(SELECT prompt FROM prompts WHERE place >= ? AND place < ?)",
            (part, KINDS.index(kind), low, high),
        )

    # ---- reading ---------------------------------------------------------------------------------------------------

    def read(self, kind: str, part: str | None = None) -> Iterator[tuple[int, dict]]:
        """(number, record) of the rows that are in, in the order of their hashes: any first few are a sample."""
        sql = (
            "SELECT rows.number, record FROM rows JOIN records USING (number) "
            "WHERE kind = ? AND step IS NULL AND (part = ? OR ? IS NULL) ORDER BY id, rows.number"
        )
        for number, record in self.database.execute(sql, (KINDS.index(kind), part, part)):
            yield number, json.loads(record)

    def read_by_prompt(self, kind: str, part: str) -> Iterator[tuple[bytes, float, dict]]:
        """(prompt, place of its unit, record), the rows of a prompt one after the other."""
        sql = (
            "SELECT rows.prompt, place, record FROM rows JOIN records USING (number) JOIN prompts USING (prompt) "
            "WHERE kind = ? AND step IS NULL AND part = ? ORDER BY rows.prompt, id"
        )
        for prompt, where, record in self.database.execute(sql, (KINDS.index(kind), part)):
            yield prompt, where, json.loads(record)

    def remove_numbers(
        self, step: str, says: str, numbers: Iterable[int], key: str = "", setting: object = None
    ) -> Step:
        """Take out these rows."""
        self.database.execute("CREATE TEMP TABLE chosen (number INTEGER PRIMARY KEY)")
        self.database.execute("BEGIN")
        self.database.executemany("INSERT OR IGNORE INTO chosen VALUES (?)", ((number,) for number in numbers))
        self.database.execute("COMMIT")
        result = self.remove(step, says, "SELECT number FROM chosen", key, setting)
        self.database.execute("DROP TABLE chosen")
        return result
