"""The pool's rules against brute force, and that the order of rows decides nothing."""

import random
from collections import Counter, defaultdict
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructrl.stages.pool import Entry, Pool, digest, normalized, place

PREFIX = 24


def entry(prompt, user="", kind="prompts", source=0, family=None, **columns):
    return Entry(kind, source, {"prompt": prompt, "user": user} | columns, family)


@pytest.fixture
def pool(tmp_path):
    made = Pool(tmp_path / "pool.db", seed=0)
    yield made
    made.close()


def filled(pool, entries, prefix=PREFIX):
    pool.add(entries, prefix)
    pool.gather()
    return pool


def left(pool, kind="prompts"):
    return [record for _, record in pool.read(kind)]


def mixed(count, seed=0):
    """Prompts with shared beginnings, repeats that differ in case and spaces, and users, some of them busy."""
    rng = random.Random(seed)
    words = [f"word{n}" for n in range(60)]
    bases = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(count // 3)]
    entries = []
    for _ in range(count):
        base = rng.choice(bases)
        text = rng.choice([base, base.upper(), base.replace(" ", "  "), f"{base} {rng.choice(words)}"])
        user = rng.choice(["", "busy", f"user {rng.randint(0, count // 20)}"])
        kind = rng.choice(["prompts", "demonstrations"])
        entries.append(entry(text, user, kind, **({"response": "yes"} if kind == "demonstrations" else {})))
    return entries


def common_prefix(a, b):
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_no_two_prompts_share_a_prefix_by_brute_force(pool):
    filled(pool, mixed(1500))
    pool.remove_shared_prefixes(PREFIX)
    kept = {normalized(row["prompt"]) for kind in ("prompts", "demonstrations") for row in left(pool, kind)}
    assert len(kept) > 100
    assert max(common_prefix(a, b) for a, b in combinations(sorted(kept), 2)) < PREFIX
    # and nothing went that shared none: every removed prompt has the beginning of a kept one
    beginnings = {prompt[:PREFIX] for prompt in kept}
    everything = {normalized(each.text) for each in mixed(1500)}
    assert {prompt[:PREFIX] for prompt in everything - kept} <= beginnings
    assert everything - kept


def test_a_prompt_that_stays_keeps_all_its_rows(pool):
    rows = [entry("a question of some length " + end, "", "demonstrations", response=r) for end in "ab" for r in "xyz"]
    filled(pool, rows)
    pool.remove_shared_prefixes(PREFIX)
    kept = left(pool, "demonstrations")
    assert len(kept) == 3
    assert len({row["prompt"] for row in kept}) == 1


def test_a_family_may_share_its_beginning(pool):
    """The K prompts of a few-shot example begin with the same instruction (App. A.1)."""
    family = [entry(f"Translate each of the following words: {n}", family=digest("f")) for n in range(4)]
    filled(pool, [*family, entry("Translate each of the following words: other")])
    pool.remove_shared_prefixes(PREFIX)
    assert len(left(pool)) in (1, 4)  # whichever came first by hash, whole
    assert pool.database.execute("SELECT count(DISTINCT unit) FROM prompts").fetchone() == (2,)


def test_at_most_so_many_prompts_a_user(pool):
    entries = mixed(3000)
    filled(pool, entries)
    pool.remove_other_owners()
    before = users(pool)
    pool.remove_above_cap(20)
    after = users(pool)
    assert before["busy"] > 20
    assert {user: min(count, 20) for user, count in before.items()} == after


def users(pool):
    found = defaultdict(set)
    for kind in ("prompts", "demonstrations"):
        for row in left(pool, kind):
            if row["user"]:
                found[row["user"]].add(normalized(row["prompt"]))
    return Counter({user: len(prompts) for user, prompts in found.items()})


def test_a_prompt_has_one_owner(pool):
    filled(pool, mixed(3000))
    removed = pool.remove_other_owners().removed
    owners = defaultdict(set)
    for kind in ("prompts", "demonstrations"):
        for row in left(pool, kind):
            if row["user"]:
                owners[normalized(row["prompt"])].add(row["user"])
    assert max(map(len, owners.values())) == 1
    assert removed["prompts"] > 0
    rows = [each for each in mixed(3000) if not each.record["user"]]
    anonymous = sum(not row["user"] for kind in ("prompts", "demonstrations") for row in left(pool, kind))
    assert anonymous == len(rows)  # a row without a user follows its prompt's owner


def test_the_line(pool):
    """Parts are the stretches of the line, users stay whole, and shares are what was asked for."""
    entries = [entry(f"question {n}", f"user {n % 700}" if n % 2 else "") for n in range(4000)]
    filled(pool, entries)
    pool.assign("prompts", "valid", 0, 0.2)
    pool.assign("prompts", "train", 0, 1)
    parts = {part: [record for _, record in pool.read("prompts", part)] for part in ("train", "valid")}
    assert len(parts["valid"]) / 4000 == pytest.approx(0.2, abs=0.03)
    by_user = [{row["user"] for row in rows if row["user"]} for rows in parts.values()]
    assert not by_user[0] & by_user[1]
    for row in parts["valid"]:
        unit = digest("user", row["user"]) if row["user"] else digest(normalized(row["prompt"]))
        assert place(unit, 0) < 0.2


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_a_part_that_chance_left_empty_is_given_a_unit(tmp_path, count):
    """Over seeds: with two units or more, both sides of the line have one; a single one stays to train."""
    for seed in range(25):
        pool = Pool(tmp_path / f"{seed}.db", seed)
        filled(pool, [entry(f"q{n}") for n in range(count)])
        pool.move("prompts", 0, 0.01)
        held_out = pool.count("prompts", "place < 0.01")
        assert held_out >= (count > 1)
        assert count - held_out >= 1
        pool.close()


def test_new_rows_move_no_old_prompt(tmp_path):
    parts = []
    for count in (300, 3000):
        pool = Pool(tmp_path / f"{count}.db", seed=0)
        filled(pool, [entry(f"q{n}") for n in range(count)])
        pool.assign("prompts", "valid", 0, 0.2)
        parts.append({record["prompt"] for _, record in pool.read("prompts", "valid")})
        pool.close()
    assert parts[0] == {prompt for prompt in parts[1] if int(prompt[1:]) < 300}


@settings(max_examples=25, deadline=None)
@given(order=st.randoms(use_true_random=False), chunk=st.integers(1, 400))
def test_the_order_of_rows_decides_nothing(tmp_path_factory, order, chunk):
    results = []
    for shuffled in (False, True):
        entries = mixed(400)
        if shuffled:
            order.shuffle(entries)
        pool = Pool(tmp_path_factory.mktemp("pool") / "pool.db", seed=3)
        for first in range(0, 400, chunk):
            pool.add(entries[first : first + chunk], PREFIX)
        pool.gather()
        pool.remove_repeated()
        pool.remove_other_owners()
        pool.remove_shared_prefixes(PREFIX)
        pool.remove_above_cap(5)
        pool.remove_same_prompts()
        results.append(([left(pool, kind) for kind in ("prompts", "demonstrations")], [s.card() for s in pool.steps]))
        pool.close()
    assert results[0] == results[1]


def test_a_mixture_keeps_so_many_of_each_source(pool):
    filled(pool, [entry(f"q{n}", source=n % 2) for n in range(100)])
    pool.remove_beyond_quotas("prompts", {0: 50, 1: 10})
    assert pool.counts("prompts", "source") == {0: 50, 1: 10}


def test_counts_add_up(pool):
    entries = mixed(2000)
    filled(pool, entries)
    pool.remove_repeated()
    pool.remove_other_owners()
    pool.remove_shared_prefixes(PREFIX)
    pool.remove_above_cap(10)
    for kind in ("prompts", "demonstrations"):
        removed = sum(step.removed.get(kind, 0) for step in pool.steps)
        assert len(left(pool, kind)) + removed == sum(each.kind == kind for each in entries)


def test_odd_text_survives(pool):
    odd = ["\ud800 lone", "nul \x00 byte", "\u200bzero width\u200d", "\u0645\u0631\u062d\u0628\u0627", "a\r\nb\tc"]
    filled(pool, [entry(text) for text in odd])
    assert sorted(row["prompt"] for row in left(pool)) == sorted(odd)
