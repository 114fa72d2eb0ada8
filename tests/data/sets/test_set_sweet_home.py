"""Furniture: catalogues, names, shapes in metres."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from set_fakes import archive, png

from mmrep.config import ConfigError, component
from mmrep.data.sets.sweet_home import CATALOGUES, SweetHome, SweetHomeConfig

# A box of 2 x 3 x 1 units: two of its six sides are enough to have its extent in all directions.
BOX = "v 10 0 0\nv 12 0 0\nv 12 3 0\nv 10 3 0\nv 10 0 1\nv 12 0 1\nv 99 99 99\nf 1 2 3 4\nf 1 2 6 5\n"
TURNED = "modelRotation#2=0 0 1 0 1 0 -1 0 0\n"


def entry(number, name, model="box.obj", tags="", more="", icon="box.png"):
    return (
        f"id#{number}=Maker#{name}\nname#{number}={name}\ntags#{number}={tags}\ncategory#{number}=Room\n"
        f"icon#{number}=/a/{icon}\nmodel#{number}=/a/{model}\nwidth#{number}=40\ndepth#{number} = 10\n"
        f"height#{number}=60.0\ncreator#{number}=Jo\n{more}\n"
    )


@pytest.fixture
def furniture(tmp_path):
    root = tmp_path / "share/sweethome3d"
    scopia = "# a comment\nid=Catalogue\nname=not an entry\n" + entry(1, "Bed", tags="SCPTS, Double,Blend Swap")
    scopia += entry(2, "Lamp", more=TURNED) + entry(3, "No icon", icon="gone.png") + entry(4, "Glow", model="light.obj")
    scopia += entry(5, "Broken", model="bad.obj") + entry(6, "Nothing", model="gone.obj") + entry(7, "bed")
    mesh = {"a/box.obj": BOX, "a/light.obj": "# empty\n", "a/bad.obj": "f 1 2 3\n", "a/box.png": png()}
    stem = "PluginFurnitureCatalog"
    archive(root / "furniture/Scopia.sh3f", {
        f"{stem}.properties": scopia,
        f"{stem}_fr.properties": "name#1=Lit \\u00e9troit\nname#99=Rien\n".encode("latin-1"),
        f"{stem}_pt_BR.properties": "name#1=Cama \\\n   larga\n",
        **mesh,
    })  # fmt: skip
    for name in ("BlendSwap-CC-0", "BlendSwap-CC-BY", "KatorLegaz", "Reallusion"):
        archive(root / f"furniture/{name}.sh3f", {f"{stem}.properties": entry(1, name), **mesh})
    jar = "com/eteks/sweethome3d/io/DefaultFurnitureCatalog.properties"
    archive(root / "sweethome3d.jar", {jar: entry(1, "eTeks", tags="Default"), **mesh})
    return root


def build(root, **fields):
    return component("sources", "sweet-home", root=str(root), **{"points": 500, **fields}).build()


def records(source):
    return {source.record_id(i).removeprefix("Maker#"): source.record(i) for i in range(len(source))}


def test_a_row_is_an_entry(furniture):
    bed = records(build(furniture))["Bed"]
    assert bed.fields["caption"] == ["Bed", "Bed, double"]
    assert bed.fields["icon"] == png()
    assert (bed.label, bed.group) == ("Room", "bed")
    assert (bed.fields["source"], bed.fields["creator"]) == ("Scopia", "Jo")
    assert records(build(furniture, tags=False, languages=["fr", "pt_BR"]))["Bed"].fields["caption"] == [
        "Lit étroit", "Cama larga",
    ]  # fmt: skip
    assert "caption" not in records(build(furniture, tags=False, languages=["fr"]))["Lamp"].fields
    assert records(build(furniture, split="test"))["eTeks"].fields["caption"] == ["eTeks"]


def test_shapes_stand_in_their_box(furniture):
    found = records(build(furniture, points=4000))
    points = found["Bed"].fields["shape"]["points"]
    assert points.shape == (4000, 3)
    assert points.dtype == np.float32
    # 40 cm wide, 60 high, 10 deep, about the middle of the box, whatever the units of the mesh and its stray corner.
    np.testing.assert_allclose(points.min(axis=0), [-0.2, -0.3, -0.05], atol=0.002)
    np.testing.assert_allclose(points.max(axis=0), [0.2, 0.3, 0.05], atol=0.002)
    back = np.isclose(points[:, 2], -0.05, atol=1e-6)
    assert 0.8 < back.mean() < 0.9  # its side has 0.24 m², the bottom 0.04
    # The lamp is turned a quarter about y before it is fitted: what was its back is now a side.
    lamp = found["Lamp"].fields["shape"]["points"]
    side = np.isclose(lamp[:, 0], -0.2, atol=1e-6)
    assert 0.55 < side.mean() < 0.65  # 0.06 m² of 0.1
    np.testing.assert_array_equal(points, records(build(furniture, points=4000))["Bed"].fields["shape"]["points"])
    other = found["bed"].fields["shape"]["points"]
    assert not np.array_equal(points, other)  # the same mesh, an entry of its own


def test_holes_and_bad_entries(furniture):
    found = records(build(furniture))
    assert set(found["Glow"].fields) == set(SweetHome.columns) - {"shape"}
    assert {name: record.cause for name, record in found.items() if not hasattr(record, "fields")} == {
        "No icon": "missing file", "Broken": "malformed mesh", "Nothing": "missing file",
    }  # fmt: skip
    without = records(build(furniture, points=0))
    assert "shape" not in without["Bed"].fields
    assert "caption" in without["Broken"].fields


def test_a_damaged_archive_spoils_its_entries_only(furniture):
    file = furniture / "furniture/Scopia.sh3f"
    data = bytearray(file.read_bytes())
    at = data.index(b"a/box.obj") + len(b"a/box.obj") + 3
    data[at : at + 8] = b"\xff" * 8
    file.write_bytes(data)
    found = records(build(furniture))
    assert found["Bed"].cause == "unreadable file"
    assert "caption" in found["Glow"].fields


def test_catalogues_are_held_out_whole(furniture):
    parts = {split: set(build(furniture, split=split).column("source")) for split in ("train", "validation", "test")}
    assert parts == {
        "train": {"Scopia", "BlendSwap-CC-0", "Reallusion"},
        "validation": {"BlendSwap-CC-BY"},
        "test": {"KatorLegaz", "eTeks"},
    }
    assert set(build(furniture, split="all").column("source")) == set(CATALOGUES)
    assert set(build(furniture, held_out=["Scopia"], validation=[], split="test").column("source")) == {"Scopia"}
    with pytest.raises(ConfigError, match="no catalogue is in 'validation'"):
        build(furniture, validation=[], split="validation")


def test_points_are_kept_between_runs(furniture, tmp_path):
    cache = tmp_path / "cache"
    first = records(build(furniture, cache=str(cache)))["Bed"].fields["shape"]["points"]
    kept = sorted(cache.iterdir())
    assert [file.suffix for file in kept] == [".npy"] * 5  # Bed, Lamp, bed and two more; neither holes nor bad entries
    for file in kept:
        np.save(file, np.load(file) + 1)
    again = records(build(furniture, cache=str(cache)))["Bed"].fields["shape"]["points"]
    np.testing.assert_allclose(again, first + 1)
    fewer = records(build(furniture, cache=str(cache), points=10))["Bed"].fields["shape"]["points"]
    assert fewer.shape == (10, 3)


def test_wrong_options_are_explained(furniture, tmp_path):
    with pytest.raises(ConfigError) as error:
        build(furniture, held_out=["Scopiaa", "eTeks"], validation=["eTeks"])
    assert "held_out: no catalogue 'Scopiaa'; did you mean 'Scopia'?" in str(error.value)
    assert "'eTeks' is in held_out too" in str(error.value)
    with pytest.raises(ConfigError, match="languages: no name in 'xx'"):
        build(furniture, languages=["xx"])
    with pytest.raises(ConfigError, match="`apt-get install sweethome3d-furniture sweethome3d`"):
        build(tmp_path / "nothing")
    (furniture / "sweethome3d.jar").unlink()
    with pytest.raises(ConfigError, match=r"no sweethome3d\.jar in .*'eTeks'; install it with `apt-get"):
        build(furniture, split="test")
    assert len(build(furniture)) == 9  # the training part does without it


def test_the_fingerprint_follows_config_and_files(furniture):
    before = build(furniture).fingerprint()
    assert build(furniture).fingerprint() == before != build(furniture, points=7).fingerprint()
    with (furniture / "sweethome3d.jar").open("ab") as jar:
        jar.write(b"x")
    assert build(furniture).fingerprint() != before


@pytest.mark.slow
def test_the_real_furniture():
    root = "/usr/share/sweethome3d"
    try:
        everything = SweetHome(SweetHomeConfig(split="all", root=root, points=256, languages=["en", "fr", "zh_CN"]))
    except ConfigError:
        pytest.skip("sweethome3d-furniture and sweethome3d are not installed")
    assert Counter(everything.column("source")) == {
        "Scopia": 395, "BlendSwap-CC-0": 175, "BlendSwap-CC-BY": 135, "eTeks": 100, "KatorLegaz": 90, "Reallusion": 25,
    }  # fmt: skip
    assert len(set(everything.column("concept"))) == 673
    assert len(set(everything.column("category"))) == 12
    assert len(set(everything._ids)) == 920
    found = [everything[i] for i in range(len(everything))]
    holes = [sample.id for sample in found if "shape" not in sample.fields]
    assert len(holes) == 8
    assert all(name.lower().endswith("lightsource") for name in holes)
    assert all(sample.fields["icon"].startswith(b"\x89PNG") for sample in found)
    points = np.stack([sample.fields["shape"]["points"] for sample in found if "shape" in sample.fields])
    assert np.isfinite(points).all()
    assert np.median(np.ptp(points, axis=1).max(axis=1)) == pytest.approx(0.7, abs=0.3)  # furniture, in metres
