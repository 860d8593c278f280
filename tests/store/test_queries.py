"""`--sql` and `FeatureStore.sql` answer one SELECT over a store's own files, and can do nothing else."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import duckdb
import pytest
import stores

from qwen_scope import FeatureStore
from qwen_scope.cli import main
from qwen_scope.errors import InputError
from qwen_scope.store.queries import read_bounded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("queries")
    (place / "secret.txt").write_text("geheim")
    (place / "secret.csv").write_text("a,b\n1,geheim\n")
    duckdb.sql("SELECT 'geheim' AS a").write_parquet(str(place / "secret.parquet"))
    made = place / "store"
    stores.make(made).close()
    os.symlink(place / "secret.txt", made / "link.txt")
    os.symlink(place, made / "away")
    os.symlink(place / "secret.parquet", made / "tokens" / "link.parquet")
    return made


HOSTILE = [
    "COPY tokens TO '{out}/x.csv'",
    "COPY (SELECT 1) TO '{store}/x.csv'",
    "COPY tokens FROM '{out}/secret.csv'",
    "ATTACH '{out}/x.db'",
    "ATTACH '{out}/secret.txt' AS y (TYPE sqlite)",
    "INSTALL httpfs",
    "INSTALL 'https://example.invalid/x.duckdb_extension'",
    "LOAD httpfs",
    "LOAD '{out}/x.duckdb_extension'",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "SET GLOBAL memory_limit = '1TB'",
    "RESET allowed_directories",
    "USE memory",
    "CALL pragma_version()",
    "EXPORT DATABASE '{out}/x'",
    "IMPORT DATABASE '{out}'",
    "CREATE TABLE t AS SELECT 1",
    "CREATE SECRET s (TYPE s3)",
    "CREATE MACRO f() AS 1",
    "DROP VIEW tokens",
    "ALTER VIEW tokens RENAME TO x",
    "INSERT INTO tokens VALUES (1)",
    "DELETE FROM tokens",
    "UPDATE tokens SET token = 0",
    "BEGIN",
    "CHECKPOINT",
    "VACUUM",
    "PREPARE p AS SELECT 1",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}/x.csv'",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY (SELECT 1) TO '{out}/x.csv'",
    "/* SELECT 1 */ COPY (SELECT 1) TO '{out}/x.csv'",
    "SELECT 1 -- ;\n; DROP VIEW tokens",
    "-- SELECT 1",
    "",
    ";;",
    "SELECT",
    "not sql at all \x1b[31m",
    "WITH x AS (INSERT INTO tokens VALUES (1) RETURNING *) SELECT * FROM x",
    "WITH x AS (DELETE FROM tokens RETURNING *) SELECT * FROM x",
    "SELECT * FROM query('COPY tokens TO ''{out}/x.csv''')",
    "SELECT getenv('HOME')",
    "FROM '/etc/passwd'",
    "FROM '{out}/secret.csv'",
    "FROM '{out}/secret.parquet'",
    "FROM read_csv('/etc/passwd', header = false)",
    "FROM read_csv('{out}/secret.csv')",
    "FROM read_text('{out}/secret.txt')",
    "FROM read_text('{store}/link.txt')",
    "FROM read_text('{store}/away/secret.txt')",
    "FROM read_text('{store}/../secret.txt')",
    "FROM read_text('{store}/tokens/../../secret.txt')",
    "FROM read_text('file://{out}/secret.txt')",
    "FROM read_blob('{out}/secret.txt')",
    "FROM read_parquet('{out}/*.parquet')",
    "FROM read_parquet('{store}/tokens/link.parquet')",
    "FROM read_json('{out}/secret.txt')",
    "FROM read_parquet('https://example.invalid/x.parquet')",
    "FROM read_parquet('s3://example/x.parquet')",
    "FROM read_parquet('hf://datasets/example/x.parquet')",
    "FROM glob('/etc/*')",
    "FROM glob('{out}/*')",
    "FROM sniff_csv('{out}/secret.csv')",
    "FROM parquet_metadata('{out}/secret.parquet')",
    "SELECT * FROM enable_logging()",
    "SELECT error('no')",
    "SELECT 'x'::INTEGER",
    "SELECT " + "(" * 40_000 + "1" + ")" * 40_000,
    "SELECT " + "1 + " * 20_000 + "1",
    "SELECT '" + "x" * 200_000 + "'",
    "FROM no_such_table",
    "FROM params",
    "SELECT ?",
    "SELECT '\udcff'",
    "SELECT * FROM duckdb_secrets()",
    "FROM read_text('/proc/self/environ')",
    "FROM read_csv_auto('/dev/stdin')",
    "FROM read_text('{store}//../secret.txt')",
    "SET VARIABLE x = 1",
    "PIVOT tokens ON document USING count(*)",
    "EXPLAIN SELECT 1",
    "SELECT * FROM query('SELECT 1; SELECT 2')",
    "SELECT * FROM query_table('/etc/passwd')",
    "FROM parquet_kv_metadata('{out}/secret.parquet')",
    "SELECT $1",
    "\x00SELECT 1",
    "SELECT TIMESTAMP 'infinity'",
]  # fmt: skip


@pytest.mark.parametrize("query", HOSTILE, ids=lambda query: query[:50])
def test_what_is_no_select_over_the_store_is_refused_in_one_sentence(folder: Path, query: str, capsys) -> None:
    before = {path: path.stat().st_size for path in folder.parent.rglob("*") if path.is_file()}
    words = query.replace("{out}", str(folder.parent)).replace("{store}", str(folder))
    assert main(["store", str(folder), "--sql", words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "geheim" not in err
    assert err.count("\n") == 1
    assert err.startswith("qwen-scope: ")
    assert "\x1b" not in err
    assert {path: path.stat().st_size for path in folder.parent.rglob("*") if path.is_file()} == before


USEFUL = {
    "SELECT count(*) AS n FROM tokens": None,
    "FROM stats LIMIT 3": 3,
    "from documents select document order by 1 limit 2;": 2,
    "WITH big AS (SELECT * FROM features WHERE value > 0) SELECT feature, max(value) FROM big GROUP BY 1 LIMIT 2": 2,
    "DESCRIBE tokens": 4,
    "SUMMARIZE stats": None,
    "SHOW TABLES": 9,
    "VALUES (1), (2)": 2,
    "SELECT 1 UNION ALL SELECT 2": 2,
    "/* why */ SELECT 1 -- because; of this\n": 1,
    "SELECT t.text, a.value FROM tokens t JOIN activations a USING (document, position) LIMIT 2": 2,
    "SELECT feature, row_number() OVER (ORDER BY tokens DESC) FROM stats LIMIT 2": 2,
    "SELECT meta::JSON ->> 'x' FROM documents LIMIT 1": 1,
    "SELECT 1 AS a, 2 AS a": 1,
    "SELECT NULL, [1, 2], {'a': 1}, DATE '2026-01-01', INTERVAL 3 DAY, 'x'::BLOB, 1.5::DECIMAL(9, 2)": 1,
    "SELECT 'COPY x TO y; ATTACH', ';'": 1,
    "SELECT * FROM residuals": 0,
}


@pytest.mark.parametrize("query", USEFUL)
def test_useful_queries_are_answered(folder: Path, query: str, capsys) -> None:
    assert main(["store", str(folder), "--sql", query, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert USEFUL[query] in (None, len(rows))
    assert main(["store", str(folder), "--sql", query]) == 0


def test_a_store_under_any_name_and_by_any_path_is_read(folder: Path, tmp_path: Path, monkeypatch) -> None:
    odd = tmp_path / "it's a 'store', \x1b[31mred"
    odd.mkdir()
    os.symlink(folder, odd / "link")
    monkeypatch.chdir(folder.parent)
    for place in (odd / "link", Path("store"), Path("store/../store"), folder):
        with FeatureStore(place) as opened:
            assert opened.sql("SELECT count(*) AS n FROM tokens")["n"].to_pylist() == [opened.manifest.tokens]
            with pytest.raises(InputError, match="DuckDB refuses"):
                opened.sql(f"FROM read_text('{folder.parent}/secret.txt')")


@pytest.mark.parametrize(
    "uri", ["s3://bucket/store", "hf://datasets/x/y", "https://example.invalid/store", "file:///x"]
)
def test_a_store_that_is_no_folder_is_one_sentence(uri: str, capsys) -> None:
    assert main(["store", uri, "--sql", "SELECT 1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_time_and_size_of_an_answer_have_an_end(folder: Path) -> None:
    with FeatureStore(folder) as opened:
        begin = time.monotonic()
        with pytest.raises(InputError, match=r"stopped after 0\.3 seconds"):
            read_bounded(opened.connection, "SELECT count(*) FROM range(100000000) a, range(100000000) b", seconds=0.3)
        assert time.monotonic() - begin < 5
        with pytest.raises(InputError, match="larger than 1 MB"):
            read_bounded(opened.connection, "SELECT * FROM range(100000000)", megabytes=1)
        with pytest.raises(InputError, match=r"larger than 1 MB|memory"):
            read_bounded(opened.connection, "SELECT repeat('x', 3000000)", megabytes=1)
        # Afterwards the same connection answers as before.
        assert read_bounded(opened.connection, "SELECT 1 AS a").to_pylist() == [{"a": 1}]


def test_python_s_own_tables_are_no_tables_of_the_store(folder: Path) -> None:
    import pyarrow as pa

    stolen = pa.table({"a": [1]})
    with FeatureStore(folder) as opened, pytest.raises(InputError, match="stolen"):
        opened.sql("SELECT * FROM stolen")
    assert len(stolen) == 1
