"""Sources of every sort, read for real: files, folders, a web server, an object store, a data set, made ones."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from noria.blobs import Blobs
from noria.errors import InvalidRequest, NoriaError, NotFound, TrainingError, Unavailable
from noria.recipes import DataSource
from noria.records import BLOB_SCHEME, Json
from tests.unit.web import Web, serving
from train.data.formats.pictures import into
from train.data.samples import Sample, VisionSample
from train.data.sources import ImageLoader, SourceData, read, read_all


def row(number: int, picture: str | None = None) -> Json:
    shown = "<image>" if picture else ""
    asked = {"role": "user", "content": f"{shown}question {number}"}
    told = {"role": "assistant", "content": f"answer {number}"}
    return {"messages": [asked, told], "images": [picture] if picture else []}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in rows).encode()


def answers(data: SourceData) -> list[str]:
    return [one.messages[-1]["content"] for one in data if isinstance(one, Sample)]


def load(source: str | Path, kind: str = "sft", **more: Any) -> SourceData:
    return read(DataSource(source=str(source), **more), kind)


def png(colour: str, size: tuple[int, int] = (6, 4)) -> bytes:
    sink = BytesIO()
    Image.new("RGB", size, colour).save(sink, format="PNG")
    return sink.getvalue()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    """The test's folder on a web server of this machine."""
    with serving(tmp_path) as found:
        yield found


def test_bad_rows_are_told_with_file_line_and_reason_and_do_not_stop_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(row(1), {"x": 1}) + b"{broken\n\n\xff\xfe\n" + lines(row(2), row(3, "gone.png"), row(4)))
    data = load(file)
    assert answers(data) == ["answer 1", "answer 2", "answer 4"]
    assert [one.source for one in data if isinstance(one, Sample)] == [f"{file}:{n}" for n in (1, 6, 8)]
    assert data.report.counts == {"rows": 7, "kept": 3, "bad": 4, "left_out": 0, "not_asked": 0, "samples": 3}
    assert [(bad.file, bad.line) for bad in data.report.bad] == [(str(file), n) for n in (2, 3, 5, 7)]
    for bad, reason in zip(data.report.bad, ("its keys: x", "not JSON", "not JSON", "gone.png"), strict=True):
        assert reason in bad.reason
    with pytest.raises(TrainingError, match=r"rows\.jsonl:2: the row fits no known format"):
        load(file, strict=True)


def test_nothing_usable_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines({"x": 1}, {"y": 1}))
    with pytest.raises(TrainingError, match=r"none of 2 rows can be used; .*rows\.jsonl:1: the row fits"):
        load(file)


def test_files_of_every_sort_and_folders_of_them(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_bytes(lines(row(1)))
    (tmp_path / "b.json").write_text(json.dumps([row(2), row(3)], indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(row(4))))
    (tmp_path / "notes.txt").write_text("no data")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(5), row(6)]), tmp_path / "d.parquet")
    data = load(tmp_path)
    assert answers(data) == [f"answer {n}" for n in range(1, 7)]
    assert data[2].source == f"{tmp_path}/b.json:2"
    assert answers(load(f"{tmp_path}/*.json*")) == [f"answer {n}" for n in range(1, 5)]
    (tmp_path / "e.csv").write_text('image,question,answer\na.png,"what, exactly?",a square\n')
    (tmp_path / "a.png").write_bytes(png("red"))
    (sample,) = load(tmp_path / "e.csv")
    assert isinstance(sample, Sample)
    assert sample.messages[0]["content"][1]["text"] == "what, exactly?"


def test_relative_pictures_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(png("red"))
    (tmp_path / "rows.jsonl").write_bytes(lines(row(1, "p/a.png")))
    monkeypatch.chdir(tmp_path / "p")
    for source in (tmp_path / "rows.jsonl", f"file://{tmp_path}/rows.jsonl", "../rows.jsonl"):
        (sample,) = load(source)
        assert isinstance(sample, Sample)
        assert ImageLoader(named=True)(sample.images[0]).getpixel((1, 1)) == (255, 0, 0)


def test_from_the_web(tmp_path: Path, web: Web) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").write_bytes(png("blue"))
    (tmp_path / "d" / "rows.jsonl").write_bytes(lines(row(1, "a.png"), row(2)))
    data = load(f"{web.url}/d/rows.jsonl?download=true")
    assert answers(data) == ["answer 1", "answer 2"]
    assert isinstance(data[0], Sample)
    assert data[0].images == (f"{web.url}/d/a.png",)
    assert ImageLoader(named=True)(data[0].images[0]).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(NotFound, match=r"no\.jsonl"):
        load(f"{web.url}/no.jsonl")
    with pytest.raises(TrainingError, match=r"d/b\.png cannot be read"):
        ImageLoader(named=True)(f"{web.url}/d/b.png")


def test_a_web_server_that_is_not_there(free_port: int) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        load(f"http://127.0.0.1:{free_port}/rows.jsonl")


def test_from_an_object_store() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe({"/bucket/x/a.jsonl": lines(row(1, "p/a.png")), "/bucket/x/p/a.png": png("green")})
    store.pipe("/bucket/x/b.jsonl", lines(row(2)))
    data = load("memory://bucket/x")
    assert answers(data) == ["answer 1", "answer 2"]
    assert isinstance(data[0], Sample)
    assert ImageLoader(named=True)(data[0].images[0]).getpixel((0, 0)) == (0, 128, 0)


def test_a_place_whose_package_is_missing_says_so() -> None:
    from fsspec.registry import known_implementations, register_implementation

    register_implementation("nowhere", "no_such_package.Files", errtxt="Install no-such-package")
    with pytest.raises(InvalidRequest, match="needs a package that is not installed: Install no-such-package"):
        load("nowhere://x/rows.jsonl")
    known_implementations.pop("nowhere")
    with pytest.raises(InvalidRequest, match="Protocol not known: nowhere"):
        load("nowhere://x/rows.jsonl")


def test_a_data_set_of_hugging_face(tmp_path: Path) -> None:
    """A folder in place of a name, since tests have no network: `datasets` treats both alike."""
    import datasets

    from train.data.sources.hub import HubRows

    pictures = [{"bytes": png("red"), "path": None}, None]
    rows = {"messages": [row(n)["messages"] for n in (1, 2)], "images": [[pictures[0]], []]}
    features = datasets.Features(
        {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}]}
        | {"images": datasets.List(datasets.Image())}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-0.parquet")
    found = HubRows(str(tmp_path), "train")
    assert len(found) == 2
    assert found[0].value["images"][0]["bytes"] == png("red")
    assert (found[1].line, found[1].value["messages"]) == (2, row(2)["messages"])
    with pytest.raises(NotFound, match="'test'"):
        HubRows(str(tmp_path), "test")


def test_a_name_that_is_neither_file_nor_data_set() -> None:
    with pytest.raises(NoriaError, match="nobody/nothing-of-this-name"):
        load("nobody/nothing-of-this-name")
    with pytest.raises(NotFound, match=r"no data at '\./rows\.jsonl'"):
        load("./rows.jsonl")


def test_count_takes_a_seeded_choice_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*(row(n) if n % 2 else {"x": n} for n in range(40))))
    first, again, other = (load(file, count=8, seed=seed) for seed in (1, 1, 2))
    assert answers(first) == answers(again) != answers(other)
    assert len(first) == len(other) == 8
    numbers = [int(one.split()[1]) for one in answers(first)]
    assert numbers == sorted(numbers)
    assert first.report.sha256 == again.report.sha256 != other.report.sha256
    counts = first.report.counts
    assert counts["rows"] == 40 == sum(counts[key] for key in ("kept", "bad", "left_out", "not_asked"))
    assert len(load(file, count=100)) == 20


def test_the_hash_follows_the_rows_and_not_their_place(tmp_path: Path) -> None:
    for name, rows in (("a", (row(1), row(2))), ("b", (row(1), row(2))), ("c", (row(2), row(1)))):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*rows))
    first, same, other = (load(tmp_path / f"{name}.jsonl").report.sha256 for name in "abc")
    assert first == same != other
    each = [hashlib.sha256(json.dumps(row(n), sort_keys=True, separators=(",", ":")).encode()).digest() for n in (1, 2)]
    assert first == "sha256:" + hashlib.sha256(b"".join(each)).hexdigest()


def test_embedded_pictures_go_to_the_blobs_and_come_back(tmp_path: Path) -> None:
    blobs = Blobs(f"file://{tmp_path}/blobs")
    coded = _base64(png("red"))
    written = ({"base64": coded}, f"data:image/png;base64,{coded}", f"data:image/png;base64,{coded[:20]}")
    (tmp_path / "rows.jsonl").write_bytes(lines(*({**row(1, "x"), "images": [one]} for one in written)))
    data = read(DataSource(source=str(tmp_path / "rows.jsonl")), "sft", keep_image=into(blobs))
    digest = hashlib.sha256(png("red")).hexdigest()
    assert [one.images for one in data if isinstance(one, Sample)] == [(digest,), (digest,)]
    assert [(bad.line, "cannot be read" in bad.reason) for bad in data.report.bad] == [(3, True)]
    assert ImageLoader(blobs.get)(digest).size == (6, 4)
    with pytest.raises(TrainingError, match="no store of pictures"):
        ImageLoader(named=True)(digest)


def test_what_captured_messages_name_is_neither_fetched_nor_read(tmp_path: Path, web: Web) -> None:
    """Every one of these is a picture that can be read, and is read with leave."""
    (tmp_path / "a.png").write_bytes(png("red"))
    blobs = Blobs(f"file://{tmp_path}/blobs")
    digest = blobs.put(png("blue"), "image/png").sha256
    data_url = f"data:image/png;base64,{_base64(png('red'))}"
    drawn = load("scenes", "vision", count=1)[0]
    assert isinstance(drawn, VisionSample)
    stored = ImageLoader(blobs.get)
    assert stored(digest).getpixel((0, 0)) == stored(BLOB_SCHEME + digest).getpixel((0, 0)) == (0, 0, 255)
    named = [f"{web.url}/a.png", str(tmp_path / "a.png"), f"file://{tmp_path}/a.png", data_url, drawn.image]
    for reference in [*named, ""]:
        with pytest.raises(TrainingError, match="what captured messages name is never fetched"):
            stored(reference)
    assert web.asked == []
    assert [ImageLoader(named=True)(reference).mode for reference in named] == ["RGB"] * 5
    assert set(web.asked) == {"/a.png"}


def _base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


def test_the_loader_keeps_the_last_ones_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png("red"))
    loader = ImageLoader(named=True, keep=2)
    kept = [loader(str(tmp_path / f"{name}.png")) for name in "abc"]
    assert loader(str(tmp_path / "c.png")) is kept[2]
    assert loader(str(tmp_path / "a.png")) is not kept[0]
    (tmp_path / "cut.png").write_bytes(png("red")[:40])
    with pytest.raises(TrainingError, match=r"cut\.png cannot be read"):
        loader(str(tmp_path / "cut.png"))
    assert loader(f"data:image/png;base64,{_base64(png('blue'))}").getpixel((0, 0)) == (0, 0, 255)


def test_the_loader_keeps_the_pixels_of_the_first_that_fit(tmp_path: Path) -> None:
    """Two of three fit: they are there when their files are gone, pixel by pixel; the third is not."""
    colours = {"a": (255, 0, 0), "b": (1, 2, 3), "c": (0, 128, 0)}
    for name, colour in colours.items():
        Image.new("RGB", (6, 4), colour).save(tmp_path / f"{name}.png")
    loader = ImageLoader(named=True, keep=1, memory=2 * 6 * 4 * 3 + 1)
    first = {name: loader(str(tmp_path / f"{name}.png")) for name in colours}
    for name in colours:
        (tmp_path / f"{name}.png").unlink()
    for name in "ab":
        again = loader(str(tmp_path / f"{name}.png"))
        assert (again.size, again.mode, again.tobytes()) == ((6, 4), "RGB", first[name].tobytes())
    with pytest.raises(TrainingError, match=r"c\.png cannot be read"):
        loader(str(tmp_path / "c.png"))


def test_made_sets_are_read_and_drawn() -> None:
    data = load("scenes", "vision", count=4)
    assert len(data) == 4
    sample = data[0]
    assert isinstance(sample, VisionSample)
    assert sample.labels
    assert ImageLoader(named=True)(sample.image).size == (96, 96)
    assert isinstance(load("scenes", "sft", count=2)[0], Sample)
    assert load("scenes", count=4).report.sha256 == load("scenes", count=4).report.sha256


def test_weights_repeat_and_choose(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 10)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*(row(start + n) for n in range(4))))
    sources = [
        DataSource(source=str(tmp_path / "a.jsonl"), weight=2.5),
        DataSource(source=str(tmp_path / "b.jsonl"), weight=0.5),
    ]
    mixed, again = (read_all(sources, "sft", seed=3) for _ in range(2))
    told = [str(one.messages[-1]["content"]) for one in mixed[:] if isinstance(one, Sample)]
    assert len(mixed) == 12
    assert {name: told.count(name) for name in told[:10]}.keys() == {f"answer {n}" for n in range(4)}
    assert all(told.count(f"answer {n}") in (2, 3) for n in range(4))
    assert len({name for name in told if int(name.split()[1]) >= 10}) == 2
    assert told == [str(one.messages[-1]["content"]) for one in again[:] if isinstance(one, Sample)]
    assert mixed.sha256 == again.sha256 != read_all(sources[:1], "sft", seed=3).sha256
    assert [report.counts["kept"] for report in mixed.reports] == [4, 4]
