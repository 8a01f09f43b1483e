"""Small files in the formats in which sets are published, written by hand."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image


def png(colour: str = "red", kind: str = "PNG") -> bytes:
    """An 8x8 picture of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, kind)
    return out.getvalue()


def write(path: Path, data: bytes) -> Path:
    """A file in folders that are made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """A JSONL file; a text among the rows is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return write(path, "".join(f"{line}\n" for line in lines).encode())


def textvqa_row(number: int, image_id: str, answers: list[str], **more: Any) -> dict[str, Any]:
    """A row of TextVQA 0.5.1."""
    row = {"question": f"what is written {number}?", "question_id": 34600 + number, "image_id": image_id}
    row |= {"image_classes": ["Sign"], "image_width": 8, "image_height": 8, "answers": answers, "set_name": "val"}
    return {**row, "question_tokens": ["what"], "flickr_original_url": "https://example.org/1.jpg", **more}


def textvqa(folder: Path, rows: list[Any]) -> Path:
    """`TextVQA_0.5.1_val.json`, with one picture beside it."""
    write(folder / "train_images" / "003a8ae2ef43b901.jpg", png(kind="JPEG"))
    told = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": rows}
    return write(folder / "TextVQA_0.5.1_val.json", json.dumps(told).encode())


def mme(folder: Path) -> Path:
    """MME's release: one category in each of its two layouts."""
    write(folder / "existence" / "000000006040.jpg", png("green", "JPEG"))
    text = "Is there a train in this image? Please answer yes or no.\tYes\n"
    text += "Is there a bed in this image? Please answer yes or no.\tNo\n"
    write(folder / "existence" / "000000006040.txt", text.encode())
    write(folder / "landmark" / "images" / "0a1b.jpg", png("blue", "JPEG"))
    text = "Is this the tower of Pisa? Please answer yes or no.\tYes\nIs this the tower of Babel?\tPerhaps\n\n"
    write(folder / "landmark" / "questions_answers_YN" / "0a1b.txt", text.encode())
    write(folder / "landmark" / "questions_answers_YN" / "gone.txt", b"Is it there?\tNo\nno tab here\n")
    return folder


def mmmu_row(id_: str, **more: Any) -> dict[str, Any]:
    """A row of MMMU, its lists written as the published files write them."""
    row: dict[str, Any] = {
        "id": id_,
        "question": "<image 1> Which of the two does <image 2> show?",
        "options": "['the first', 'the second']",
        "explanation": "",
        **{f"image_{number}": None for number in range(1, 8)},
        "img_type": "['Diagrams']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Managerial Accounting",
    }
    return {**row, **more}


def parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 2) -> Path:
    """A parquet file as the hub has them: pictures are structs of bytes and path."""
    pyarrow, pq = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.Table.from_pylist(rows)
    for name in table.column_names:
        if name == "image" or (name.startswith("image_") and name[6:].isdecimal()):
            column = pyarrow.array([row.get(name) for row in rows], pictures)
            table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def cell(colour: str) -> dict[str, Any]:
    """A parquet cell with a picture in it."""
    return {"bytes": png(colour), "path": f"{colour}.png"}
