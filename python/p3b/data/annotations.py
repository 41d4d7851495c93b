# SPDX-License-Identifier: MIT
"""Data sets with annotation files beside the images: iNaturalist's competitions and iFood, as unpacked.

iNaturalist 2017 to 2021: `train2018.json` and `val2018.json` (COCO format: images, annotations, categories) with paths
such as `train_val2018/Plantae/7477/NAME.jpg`, relative to the folder of the json files.
iFood-251 and others: `train_labels.csv` and `val_labels.csv` (or `..._info.csv`, or `train.csv` and `val.csv`) with
rows of image name and label, images in `train_set/` and `val_set/` (or `train/` and `val/`, or the folder itself), and
the names of the classes in `class_list.txt` where there is one (rows of number and name).

Without an annotation file for validation there is one part only; `create_data` then splits it by class.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

Samples = list[tuple[str, int]]  # path, label
CSV_NAMES = ("{}_labels.csv", "{}_info.csv", "{}.csv")
CSV_IMAGES = ("{}_set", "{}", ".")


def find_lists(folder: str) -> tuple[list[Samples], tuple[str, ...]] | None:
    """The parts of a data set with annotation files (training, and validation where annotated) and its class names.

    None where the folder has no annotation file for training. Raises ValueError for a file that cannot be read or that
    does not match the images.
    """
    root = Path(folder)
    lists = sorted(root.glob("train*.json"))
    if len(lists) > 1:
        names = ", ".join(path.name for path in lists)
        raise ValueError(f"data: {folder} has annotation files of several data sets ({names}); move all but one away")
    if lists:
        validation = lists[0].with_name(lists[0].name.replace("train", "val", 1))
        return _from_json(root, [path for path in (lists[0], validation) if path.is_file()])
    for form in CSV_NAMES:
        paths = [root / form.format(part) for part in ("train", "val")]
        if paths[0].is_file():
            return _from_csv(root, [path for path in paths if path.is_file()])
    return None


def _from_json(root: Path, paths: list[Path]) -> tuple[list[Samples], tuple[str, ...]]:
    parts: list[list[tuple[str, Any]]] = []
    categories: dict[Any, str] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            file_of = {image["id"]: image["file_name"] for image in content["images"]}
            parts.append([(file_of[note["image_id"]], note["category_id"]) for note in content["annotations"]])
            categories |= {category["id"]: str(category["name"]) for category in content["categories"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            form = "COCO annotations (images, annotations, categories)"
            raise ValueError(f"data: {path} cannot be read as {form}: {type(error).__name__}: {error}") from error
    numbers = sorted(categories)
    names = [categories[number] for number in numbers]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for name, number in zip(names, numbers, strict=True)]
    label_of = {number: label for label, number in enumerate(numbers)}
    samples = [_samples(path, root, rows, label_of) for path, rows in zip(paths, parts, strict=True)]
    return samples, tuple(names)


def _from_csv(root: Path, paths: list[Path]) -> tuple[list[Samples], tuple[str, ...]]:
    parts = [_rows(path) for path in paths]
    labels = {label for rows in parts for _, label in rows}
    listed = root / "class_list.txt"
    names: tuple[str, ...]
    if all(label.isdecimal() for label in labels):
        names = tuple(str(i) for i in range(max(map(int, labels)) + 1))
        if listed.is_file():
            lines = [line.split(maxsplit=1) for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
            known = {int(line[0]): line[-1] for line in lines if line[0].isdecimal()}
            names = tuple(known.get(i, str(i)) for i in range(max(len(names), *(i + 1 for i in known), 0)))
        label_of: dict[Any, int] = {label: int(label) for label in labels}
    else:
        names = tuple(sorted(labels))
        label_of = {name: label for label, name in enumerate(names)}
    samples = []
    for part, path, rows in zip(("train", "val"), paths, parts, strict=False):
        places = [root / place.format(part) for place in CSV_IMAGES]
        place = next(p for p in places if p.is_dir())
        samples.append(_samples(path, place, rows, label_of))
    return samples, names


def _rows(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(row[0].strip(), row[1].strip()) for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error, IndexError) as error:
        raise ValueError(f"data: {path} cannot be read as rows of image name and label: {error}") from error
    if rows and not os.path.splitext(rows[0][0])[1]:  # column names
        del rows[0]
    if not rows:
        raise ValueError(f"data: {path} has no rows of image name and label")
    return rows


def _samples(path: Path, place: Path, rows: list[tuple[str, Any]], label_of: dict[Any, int]) -> Samples:
    unknown = next((label for _, label in rows if label not in label_of), None)
    if unknown is not None:
        raise ValueError(f"data: {path} has the label {unknown!r}, which is not among its categories")
    if not rows or not (place / rows[0][0]).is_file():
        problem = f"{place / rows[0][0]}, which does not exist" if rows else "no images"
        raise ValueError(f"data: {path} lists {problem}")
    return [(os.path.join(place, name), label_of[label]) for name, label in rows]
