"""How a list of captions is planned as it grows, beside plain Python on a small one:
python benchmarks/captions.py [--millions 1 10 50] [--folder .]. The lists are made up; 50 M need about 12 GB of disk."""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

WORDS = """
a the red blue old young woman man dog cat street city mountain lake photo portrait vintage illustration sitting standing
holding wearing near beside under beautiful modern kitchen living room design vector stock sunset beach market black white
small large wooden table chair
""".split()  # noqa: SIM905


def make_list(path: Path, rows: int) -> None:
    """Captions of 63 characters on average: 13 % repeat another, 4 % have white space around them, 0.5 % are empty."""
    import duckdb

    database = duckdb.connect()
    database.execute("SET preserve_insertion_order=false; SET memory_limit='2GB'; SET enable_progress_bar=false")
    database.execute(f"SET VARIABLE words = {WORDS}")
    text = "||' '||".join(f"getvariable('words')[1 + ((h >> {6 * k}) % {len(WORDS)})::INT]" for k in range(9))
    lines = (
        "SELECT CASE WHEN h % 50 = 0 THEN '  ' || t || ' ' WHEN h % 50 = 1 THEN chr(160) || t || chr(9) "
        f"WHEN h % 200 = 2 THEN '' ELSE t END AS caption FROM (SELECT h, {text} || ' ' || k AS t "
        f"FROM (SELECT hash(k + 1) AS h, k FROM (SELECT if(i % 20 < 3, hash(i) % {rows}, i) AS k FROM range({rows}) r(i))))"
    )
    if path.suffix == ".parquet":
        database.execute(f"COPY ({lines}) TO '{path}' (FORMAT parquet)")
    else:
        plain = path.with_suffix("")  # DuckDB compresses on one core, at a level that cannot be chosen
        database.execute(f"COPY ({lines}) TO '{plain}' (FORMAT csv, HEADER false, QUOTE '', DELIMITER '|')")
        subprocess.run(["gzip", "-1", str(plain)], check=True)


def ours(source: Path, run: Path) -> None:
    """All that a launch does before it submits: captions.parquet and plan.json, hashed and on the disk."""
    from generation.plan import make_plan
    from generation.settings import GenerateConfig, resolve

    make_plan(resolve(GenerateConfig(out=str(run), captions=[str(source)]), 0), write=True)


def plain_python(source: Path, run: Path) -> None:
    """The same list by a set and a sort."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    from generation.identity import caption_id

    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = sorted((caption_id(text), text) for text in {line.strip() for line in file} - {""})
    run.mkdir()
    pq.write_table(pa.table({"id": [i for i, _ in rows], "text": [t for _, t in rows]}), run / "captions.parquet")


def measure(way: str, source: Path) -> tuple[float, float, float, float]:
    """Wall s, CPU s, peak resident MB and the most MB spilled of one way, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        temporary = Path(folder) / "tmp"
        temporary.mkdir()
        begin, spilled, pid = time.monotonic(), 0, 0
        child = subprocess.Popen(
            [sys.executable, __file__, "--child", way, str(source), f"{folder}/run"],
            env={**os.environ, "TMPDIR": str(temporary)}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while not pid:
            time.sleep(0.1)
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            spilled = max(spilled, _size(temporary))
        if status:
            raise SystemExit(f"{way} of {source.name} failed")
        return time.monotonic() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3, spilled / 1e6


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def main() -> None:
    """Print a line a list and format; ratios are to n log n, from the first size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 10, 50])
    parser.add_argument("--folder", default=".")
    parser.add_argument("--child", nargs=3)
    words = parser.parse_args()
    if words.child:
        way, source, run = words.child
        {"ours": ours, "plain Python": plain_python}[way](Path(source), Path(run))
        return
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    print("| list | wall s | CPU s | peak MB | spill MB | captions/s | CPU / n log n | memory / n log n |", flush=True)
    first: dict[str, tuple[float, ...]] = {}
    with tempfile.TemporaryDirectory(dir=words.folder) as folder:
        for kind, millions in ((k, m) for m in words.millions for k in ("parquet", "txt.gz")):
            rows = int(millions * 1e6)
            source = Path(folder) / f"list.{kind}"
            make_list(source, rows)
            for way in ["ours", "plain Python"] if kind == "txt.gz" and millions == words.millions[0] else ["ours"]:
                wall, cpu, memory, spill = measure(way, source)
                line = f"| {millions:g} M {kind}, {way} | {wall:.1f} | {cpu:.1f} | {memory:.0f} | {spill:.0f} "
                line += f"| {rows / wall:,.0f} |"
                if way == "ours":
                    work = rows * math.log(rows)
                    base = first.setdefault(kind, (work, cpu, memory))
                    line += f" {cpu / base[1] / (work / base[0]):.2f} | {memory / base[2] / (work / base[0]):.2f} |"
                else:
                    line += f" {cpu / first[kind][1]:.1f}x the CPU | {memory / first[kind][2]:.1f}x the memory |"
                print(line, flush=True)
            source.unlink()


if __name__ == "__main__":
    main()
