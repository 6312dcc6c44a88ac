"""ADE20K (the 150 classes of the scene parsing challenge): ``images/`` and ``annotations/``.

Below each, ``training/`` and ``validation/``. Value 0 is "other" and does not count.
"""

from __future__ import annotations

from pathlib import Path

from fmupsample.labels.classes import table_of
from fmupsample.labels.layouts.matching import (
    Found,
    keep_split,
    match,
    read_split,
    split_folder,
)

NAME = "ade20k"
WHAT = "images/{training,validation} and annotations/{training,validation}, 0 ignored"

_CLASSES = (
    "wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,"
    "earth,door,table,mountain,plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,"
    "mirror,rug,field,armchair,seat,fence,desk,rock,wardrobe,lamp,bathtub,railing,cushion,base,"
    "box,column,signboard,chest of drawers,counter,sand,sink,skyscraper,fireplace,refrigerator,"
    "grandstand,path,stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,"
    "bookcase,blind,coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,"
    "kitchen island,computer,swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,"
    "tower,chandelier,awning,streetlight,booth,television receiver,airplane,dirt track,apparel,"
    "pole,land,bannister,escalator,ottoman,bottle,buffet,poster,stage,van,ship,fountain,"
    "conveyer belt,canopy,washer,plaything,swimming pool,stool,barrel,basket,waterfall,tent,"
    "bag,minibike,cradle,oven,ball,food,step,tank,trade name,microwave,pot,animal,bicycle,lake,"
    "dishwasher,screen,blanket,sculpture,hood,sconce,vase,traffic light,tray,ashcan,fan,pier,"
    "crt screen,plate,monitor,bulletin board,shower,radiator,glass,clock,flag"
)
TABLE = table_of(_CLASSES.split(","), ignored=(0, 255), first=1)


def recognises(images: Path, labels: Path | None) -> bool:
    if labels is None:
        images, labels = images / "images", images / "annotations"
    return labels.is_dir() and next(labels.rglob("ADE_*_*.png"), None) is not None


def find(images: Path, labels: Path | None, split: str | None) -> Found:
    if labels is None:
        images, labels = images / "images", images / "annotations"
    listed = Path(split) if split is not None and Path(split).is_file() else None
    if split is not None and listed is None:
        split = {"train": "training", "val": "validation"}.get(split, split)
        images = split_folder(images, split, "pictures")
        labels = split_folder(labels, split, "labels")
    found = match(images, labels)
    found.table, found.ignored = TABLE, TABLE.ignored
    return found if listed is None else keep_split(found, read_split(listed), listed)
