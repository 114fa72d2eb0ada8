"""Every form and fault of a point cloud, against values worked out by hand."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from mmrep.encoder import BadSampleError
from mmrep.modalities.point_cloud import _files
from mmrep.modalities.point_cloud.decode import MAX_COORDINATE, Cloud, decode

XYZ = np.array([[0.0, 1.0, 2.0], [-3.5, 4.0, 0.25], [1e6 + 0.125, 0.0, 7.0], [0.0, 1.0, 2.0]])
RGB = np.array([[255, 0, 51], [0, 0, 0], [102, 255, 153], [1, 2, 3]], np.uint8)
UP = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]])


def cause(raw, **options) -> str:
    with pytest.raises(BadSampleError) as caught:
        decode(raw, **options)
    return caught.value.cause


def same(cloud: Cloud, points=XYZ, colors=None, normals=None) -> None:
    assert cloud.points.dtype == np.float64
    for found, want in ((cloud.points, points), (cloud.colors, colors), (cloud.normals, normals)):
        if want is None:
            assert found is None
        else:
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-7)


def ply(points=XYZ, colors=None, normals=None, form="ascii", type="double") -> bytes:
    columns = [(axis, points[:, i], type) for i, axis in enumerate("xyz")]
    columns += [] if normals is None else [(f"n{a}", normals[:, i], "float") for i, a in enumerate("xyz")]
    columns += [] if colors is None else [(c, colors[:, i], "uchar") for i, c in enumerate(("red", "green", "blue"))]
    head = ["ply", f"format {form} 1.0", f"element vertex {len(points)}"]
    head += [f"property {kind} {name}" for name, _, kind in columns]
    codes = {"double": "d", "float": "f", "uchar": "B"}
    rows = zip(*(values.tolist() for _, values, _ in columns), strict=True)
    if form == "ascii":
        body = "".join(" ".join(map(str, row)) + "\n" for row in rows).encode()
    else:
        body = b"".join(struct.pack("<" + "".join(codes[kind] for *_, kind in columns), *row) for row in rows)
    return "\n".join([*head, "end_header\n"]).encode() + body


def npy(array: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def test_every_source_gives_the_same_points(tmp_path: Path):
    data = ply()
    path = tmp_path / "a b.ply"
    path.write_bytes(data)
    sources = [
        path, str(path), path.as_uri(), data, bytearray(data), io.BytesIO(data), XYZ, XYZ.tolist(),
        torch.from_numpy(XYZ), {"points": XYZ}, {"points": torch.from_numpy(XYZ), "colors": None},
        {"bytes": data, "path": "x.ply"},
        {"bytes": None, "path": str(path)}, trimesh.PointCloud(XYZ),
        "data:application/octet-stream;base64," + base64.b64encode(data).decode(),
    ]  # fmt: skip
    for source in sources:
        same(decode(source))
    with path.open("rb") as stream:
        same(decode(stream))
        assert not stream.closed


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian"])
def test_a_ply_has_colours_and_normals_and_double_precision(form: str):
    same(decode(ply(XYZ, RGB, UP, form)), XYZ, RGB / 255, UP)
    same(decode(ply(XYZ, RGB, None, form)), XYZ, RGB / 255)


def test_array_files():
    same(decode(npy(XYZ)))
    same(decode(npz(points=XYZ, colors=RGB, normals=UP, label=np.array(3))), XYZ, RGB / 255, UP)
    same(decode(npz(anything=XYZ)))
    assert cause(npz(a=XYZ, b=XYZ)) == "not a point cloud"
    assert cause(npy(np.array([XYZ, None], dtype=object), allow_pickle=True)) == "damaged cloud"
    assert cause(npy(XYZ)[:-1]) == "damaged cloud"
    assert cause({"bytes": b"nothing", "path": "a.npz"}) == "damaged cloud"


def test_text_files(tmp_path: Path):
    rows = np.concatenate([XYZ, RGB], 1)
    spaced = "# x y z r g b\n" + "".join(
        f"{x:.6f} {y:.6f}\t{z:.6f} {r:.0f} {g:.0f} {b:.0f}\n" for x, y, z, r, g, b in rows
    )
    commas = "\n\n".join(",".join(map(str, row)) for row in np.concatenate([XYZ, RGB / 255], 1).tolist()) + " // end"
    for text, name in ((spaced, "a.txt"), (commas, "a.XYZ"), (f"4\n{spaced}", "a.pts")):
        same(decode({"bytes": text.encode(), "path": name}), XYZ, RGB / 255)
    assert cause({"bytes": f"5\n{spaced}".encode(), "path": "a.pts"}) == "damaged cloud"
    assert cause({"bytes": b"x y z\n1 2 3\n", "path": "a.xyz"}) == "damaged cloud"
    assert cause({"bytes": b"1 2 3\n1 2\n", "path": "a.xyz"}) == "damaged cloud"
    assert cause({"bytes": b"\xff\xfe1", "path": "a.xyz"}) == "damaged cloud"
    assert cause({"bytes": b"1 2 3 4\n", "path": "a.xyz"}) == "wrong columns"
    assert cause({"bytes": b"# none\n", "path": "a.xyz"}) == "empty cloud"
    normals = "".join(" ".join(map(str, row)) + "\n" for row in np.concatenate([XYZ, UP], 1).tolist()).encode()
    same(decode({"bytes": normals, "path": "a.txt"}, columns="xyz-normals"), XYZ, None, UP)


def test_columns_of_arrays():
    nine = np.concatenate([XYZ, RGB / 255, UP], 1)
    same(decode(nine), XYZ, RGB / 255, UP)
    same(decode(nine[:, :6]), XYZ, RGB / 255)
    same(decode(nine[:, [0, 1, 2, 6, 7, 8, 3, 4, 5]], columns="xyz-normals-rgb"), XYZ, RGB / 255, UP)
    same(decode(nine[:, [0, 1, 2, 6, 7, 8]], columns="xyz-normals"), XYZ, None, UP)
    for width in (1, 2, 4, 5, 7, 8, 10):
        assert cause(np.zeros((20, width))) == "wrong columns"
    assert cause(nine, columns="xyz-rgb") == "wrong columns"
    with pytest.raises(BadSampleError, match=r"\(3, 20\).*transposed"):
        decode(XYZ.T.repeat(5, 1))
    with pytest.raises(BadSampleError, match=r"\(4, 4\).*cut other columns off"):
        decode(np.zeros((4, 4)))
    for raw in (np.zeros(3), np.zeros((2, 5, 3)), [[0, 0, 0], [1, 1]], np.array(1.0)):
        assert cause(raw) == "wrong columns"
    for raw in ({"points": XYZ, "colors": RGB[:3]}, {"points": XYZ, "normals": UP[:, :2]}, {"points": XYZ[:, :2]}):
        assert cause(raw) == "wrong columns"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8, np.int16])
def test_number_types_of_coordinates(dtype):
    points = np.array([[0, 1, 2], [3, 4, 250]]).astype(dtype)
    same(decode(points), points.astype(float))
    same(decode(torch.from_numpy(points)), points.astype(float))
    same(decode(torch.tensor([[0.5, 1, 2]], dtype=torch.bfloat16)), [[0.5, 1, 2]])


def test_colours_go_by_their_dtype():
    for colors in (RGB, RGB.astype(np.int64), RGB.tolist(), RGB.astype(np.uint16) * 257, RGB / 255):
        same(decode({"points": XYZ, "colors": colors}), XYZ, RGB / 255)
    dark = np.array([[0.0, 1, 0]] * 4)
    same(decode({"points": XYZ, "colors": dark}), XYZ, dark)
    same(decode({"points": XYZ, "colors": dark + 5e-4}), XYZ, np.clip(dark + 5e-4, 0, 1))
    with pytest.raises(BadSampleError, match="divide by 255"):
        decode({"points": XYZ, "colors": RGB.astype(float)})
    with pytest.raises(BadSampleError, match="normals"):
        decode(np.concatenate([XYZ, -UP], 1))
    assert cause({"points": XYZ, "colors": RGB.astype(int) + 1}) == "value range"
    assert cause({"points": XYZ, "colors": RGB > 3}) == "unsupported values"


def test_normals_are_made_unit_length():
    cloud = decode({"points": XYZ, "normals": UP * [[2], [1e-200], [1e200], [1]]})
    np.testing.assert_allclose(cloud.normals, UP, atol=1e-6)
    long = decode({"points": XYZ, "normals": np.ones((4, 3))})
    np.testing.assert_allclose(long.normals, 3**-0.5, atol=1e-6)


def test_values_that_stand_for_nothing_are_refused():
    for bad in (np.nan, np.inf, -np.inf):
        broken = XYZ.copy()
        broken[1, 2] = bad
        assert cause(broken) == cause({"points": XYZ, "normals": broken}) == "not finite"
        assert cause(ply(broken)) == "not finite"
        assert cause({"points": XYZ, "colors": broken}) == "not finite"
    assert cause(np.full((2, 3), 1.01 * MAX_COORDINATE)) == "value range"
    same(decode(np.full((2, 3), -MAX_COORDINATE)), np.full((2, 3), -MAX_COORDINATE))
    for raw in (XYZ > 0, XYZ + 1j, XYZ.astype(str), XYZ.astype(object)):
        assert cause(raw) == "unsupported values"
    for raw in (
        [],
        np.zeros((0, 3)),
        np.zeros((0, 6)),
        {"points": []},
        trimesh.Trimesh(),
        trimesh.Scene(),
        npy(XYZ[:0]),
    ):
        assert cause(raw) == "empty cloud"
    for raw in (17, None, object(), {"point": XYZ}, {"points": XYZ, "colour": RGB}, {}):
        assert cause(raw) == "not a point cloud"
    assert cause(XYZ, max_points=3) == "too large"
    same(decode(XYZ, max_points=4))


def test_what_is_not_there_or_of_no_known_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert cause(tmp_path / "none.ply") == "missing file"
    assert cause(str(tmp_path)) == "unreadable file"
    assert cause("https://example.org/a.ply") == "url"
    assert cause(b"") == cause(b"0 0 0\n1 1 1\n") == cause({"bytes": ply(), "path": "a.mesh"}) == "unknown format"
    with pytest.raises(BadSampleError, match="did you mean 'ply'"):
        decode({"bytes": ply(), "path": "a.plyy"})
    for raw in (b"LASF" + bytes(300), {"bytes": b"", "path": "x.laz"}, {"bytes": ply(), "path": "x.las"}):
        with pytest.raises(BadSampleError, match="LAS is not read"):
            decode(raw)
    monkeypatch.setattr(_files, "MAX_BYTES", 100)
    assert cause(ply()) == "too large"
    bomb = npz(points=np.zeros((10000, 3)))
    monkeypatch.setattr(_files, "MAX_BYTES", len(bomb))
    assert cause(bomb) == "too large"


class Closing(io.BytesIO):
    """A file object whose disk fails."""

    def read(self, *_):
        raise OSError("input/output error")


def test_a_failing_disk_is_a_bad_sample():
    assert cause(Closing(b"")) == "unreadable file"


BOX = trimesh.creation.box((1, 2, 3))


@pytest.mark.parametrize("kind", ["ply", "obj", "glb", "gltf", "off", "stl"])
def test_meshes_are_sampled_on_the_surface_by_area(kind: str):
    exported = BOX.export(file_type=kind)
    if isinstance(exported, dict):  # glTF: fold the buffer into the document
        document = json.loads(exported["model.gltf"])
        for buffer in document["buffers"]:
            blob = base64.b64encode(exported[buffer["uri"]]).decode()
            buffer["uri"] = f"data:application/octet-stream;base64,{blob}"
        exported = json.dumps(document)
    data = exported if isinstance(exported, bytes) else exported.encode()
    raw = {"bytes": data, "path": f"box.{kind}"}
    cloud = decode(raw, samples=4000)
    assert len(cloud.points) == 4000
    scaled = cloud.points / [0.5, 1, 1.5]
    np.testing.assert_allclose(np.abs(scaled).max(1), 1, atol=1e-5)
    side = np.abs(scaled).argmax(1)
    shares = np.bincount(side, minlength=3) / 4000
    np.testing.assert_allclose(shares, np.array([6, 3, 2]) / 11, atol=0.03)  # areas 2*3, 1*3, 1*2
    assert cloud.normals is not None
    outward = np.take_along_axis(cloud.normals * np.sign(cloud.points), side[:, None], 1)
    np.testing.assert_allclose(outward, 1, atol=1e-5)
    again, other = decode(raw, samples=4000), decode(raw, samples=4000, seed=1)
    assert np.array_equal(again.points, cloud.points)
    assert not np.array_equal(other.points, cloud.points)


def test_parts_of_a_scene_stand_in_their_places_and_have_their_shares():
    small, large = trimesh.creation.box((1, 1, 1)), trimesh.creation.box((2, 2, 2))
    small.visual.vertex_colors = [255, 0, 0, 255]
    scene = trimesh.Scene()
    scene.add_geometry(small, transform=trimesh.transformations.translation_matrix([10, 0, 0]))
    scene.add_geometry(large)
    scene.add_geometry(trimesh.PointCloud([[99.0, 0, 0]]))
    for raw in (scene, {"bytes": scene.export(file_type="glb"), "path": "s.glb"}):
        cloud = decode(raw, samples=1001)
        far = cloud.points[:, 0] > 5
        assert len(far) == 1001
        assert int(far.sum()) in (200, 201)  # areas 6 and 24
        np.testing.assert_allclose(np.abs(cloud.points[far] - [10, 0, 0]).max(1), 0.5)
        np.testing.assert_allclose(np.abs(cloud.points[~far]).max(1), 1)
        np.testing.assert_allclose(cloud.colors[far], np.tile([1, 0, 0], (far.sum(), 1)))
        np.testing.assert_allclose(cloud.colors[~far], 0.5)


def test_colours_of_meshes():
    mesh = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    mesh.visual.vertex_colors = [[0, 0, 0, 255], [255, 0, 0, 255], [0, 255, 0, 255]]
    cloud = decode(mesh, samples=300)
    np.testing.assert_allclose(cloud.colors[:, :2], cloud.points[:, :2], atol=1e-6)
    box = BOX.copy()
    box.visual.face_colors = np.where(box.face_normals[:, :1] > 0.5, [255, 0, 0, 255], [0, 0, 255, 255]).astype(
        np.uint8
    )
    cloud = decode(box, samples=300)
    assert np.array_equal(cloud.colors[:, 0] == 1, cloud.normals[:, 0] > 0.5)
    plain = PBRMaterial(baseColorFactor=[0, 255, 0, 255])
    image = Image.new("RGB", (4, 4), (0, 255, 0))
    textured = PBRMaterial(baseColorTexture=image)
    for visual in (TextureVisuals(material=plain), TextureVisuals(uv=np.full((8, 2), 0.5), material=textured)):
        box.visual = visual
        for raw in (box, {"bytes": box.export(file_type="glb"), "path": "a.glb"}):
            np.testing.assert_allclose(decode(raw, samples=20).colors, np.tile([0, 1, 0], (20, 1)))
    assert decode(BOX, samples=20).colors is None


def test_meshes_without_a_surface_give_their_vertices():
    corners = [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    line = trimesh.Trimesh(corners, [[0, 1, 2]], process=False)
    off = {"bytes": b"OFF\n3 0 0\n0 0 0\n1 0 0\n2 0 0\n", "path": "a.off"}
    obj = {"bytes": b"v 0 0 0 1 0 0\nv 1 0 0 1 0 0\nv 2 0 0 0 1 0\n", "path": "a.obj"}
    for raw in (line, trimesh.Trimesh(corners), off, obj):
        assert np.array_equal(decode(raw, samples=50).points, corners)
    np.testing.assert_array_equal(decode(obj).colors, [[1, 0, 0], [1, 0, 0], [0, 1, 0]])


def test_broken_meshes():
    assert cause({"bytes": b"OFF\n2 1 0\n0 0 0\n1 0 0\n3 0 1 2\n", "path": "a.off"}) == "damaged cloud"
    assert cause({"bytes": b"OFF\n3 1 0\n0 0 0\nnan 0 0\n0 1 0\n3 0 1 2\n", "path": "a.off"}) == "not finite"
    assert cause(trimesh.Trimesh(BOX.vertices, [[0, 1, 9]], process=False)) == "damaged cloud"
    assert cause(trimesh.Trimesh(BOX.vertices, [[0, 1, -1]], process=False)) == "damaged cloud"
    for raw in (BOX, trimesh.Scene(BOX)):
        for limit in (7, 11):  # it has 8 vertices and 12 faces
            assert cause(raw, samples=5, max_points=limit) == "too large"
        assert len(decode(raw, samples=5, max_points=12).points) == 5


def test_nothing_is_fetched_or_opened_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_, **__):
        raise AssertionError("a connection is made")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "a.bin").write_bytes(bytes(36))
    (tmp_path / "a.mtl").write_text("newmtl red\nKd 1 0 0\n")
    for uri in ("http://127.0.0.1:9/a.bin", "a.bin", str(tmp_path / "a.bin")):
        document = {
            "asset": {"version": "2.0"}, "buffers": [{"uri": uri, "byteLength": 36}],
            "bufferViews": [{"buffer": 0, "byteLength": 36}],
            "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
            "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}], "nodes": [{"mesh": 0}],
            "scenes": [{"nodes": [0]}], "scene": 0,
        }  # fmt: skip
        path = tmp_path / "a.gltf"
        path.write_text(json.dumps(document))
        assert cause(path) == "damaged cloud"
    path = tmp_path / "a.obj"
    path.write_text("mtllib a.mtl\nusemtl red\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    monkeypatch.setattr(trimesh.resolvers.FilePathResolver, "get", refuse)
    assert decode(path, samples=5).colors is None


def contents() -> dict[str, bytes]:
    box = BOX.subdivide()
    made = {kind: box.export(file_type=kind) for kind in ("ply", "obj", "glb", "off", "stl")}
    made = {kind: data if isinstance(data, bytes) else data.encode() for kind, data in made.items()}
    noise = np.random.default_rng(0).random((40, 3))
    return {**made, "PLY": ply(noise, form="ascii"), "npy": npy(noise), "npz": npz(points=noise)}


@pytest.mark.parametrize("kind", ["ply", "obj", "glb", "off", "stl", "PLY", "npy", "npz"])
def test_a_cut_or_damaged_file_raises_nothing_else(kind: str):
    data = contents()[kind]
    generator = np.random.default_rng(2)
    cut = [data[:n] for n in range(0, len(data) * 9 // 10, max(1, len(data) // 40))]
    damaged = []
    for _ in range(60):
        changed = bytearray(data)
        for place in generator.integers(0, len(data), 3):
            changed[place] = generator.integers(0, 256)
        damaged.append(bytes(changed))
    causes = []
    with np.errstate(all="ignore"):
        for content in (*cut, *damaged):
            try:
                decode({"bytes": content, "path": f"a.{kind}"}, samples=10, max_points=100_000)
            except BadSampleError as error:
                causes.append(error.cause)
    assert len(causes) > (0 if kind == "obj" else 20)  # an OBJ has no length: a piece of one is one
    assert set(causes) <= {"damaged cloud", "empty cloud", "not finite", "value range", "too large", "wrong columns",
                           "unsupported values", "not a point cloud"}  # fmt: skip


def test_a_text_ply_cut_after_a_line_is_noticed():
    for data in (ply(), BOX.export(file_type="ply", encoding="ascii")):
        data = data if isinstance(data, bytes) else data.encode()
        assert cause(data[: data.rstrip().rindex(b"\n") + 1]) == "damaged cloud"


def test_an_archive_of_something_else():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("points.txt", "0 0 0")
    assert cause(out.getvalue()) in ("damaged cloud", "wrong columns", "unsupported values")
