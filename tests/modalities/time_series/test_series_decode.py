"""Every form of a series is read to the same values and times, or refused for a stable cause."""

from __future__ import annotations

import io
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmrep import BadSampleError
from mmrep.modalities.time_series.decode import decode

NAN = float("nan")
VALUES = np.array([[1.0, 10.0], [2.0, NAN], [3.5, -30.0]])
DAYS = pd.date_range("2024-02-28", periods=3, freq="D")
TABLE = pd.DataFrame(VALUES, columns=["a", "b"])


def parquet(table: pd.DataFrame) -> bytes:
    out = io.BytesIO()
    table.to_parquet(out)
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize("raw", [
    VALUES, VALUES.astype(np.float16), torch.tensor(VALUES), torch.tensor(VALUES).bfloat16().requires_grad_(),
    VALUES.tolist(), [[1, 10], [2, None], [3.5, -30]], np.array([[1, 10], [2, None], [3.5, -30]], dtype=object),
    np.ma.masked_equal(np.nan_to_num(VALUES, nan=99), 99), TABLE, TABLE.convert_dtypes(), {"values": VALUES},
    TABLE.to_csv(index=False).encode(), TABLE.to_csv(index=False, header=False).encode(), b"a;b\n1;10\n2;\n3.5;-30",
    "\ufeffa, b\n1, 10\n2, NA\n3.5, -30\n".encode(), b"\n1\t10\n2\tnull\n\n3.5\t-30\n", parquet(TABLE), npy(VALUES),
    npy(np.asfortranarray(VALUES)), io.BytesIO(npy(VALUES)), {"bytes": npy(VALUES), "path": None},
    "data:text/csv,1%2C10%0A2%2C%0A3.5%2C-30",
])  # fmt: skip
def test_every_form_gives_the_same_values(raw: Any):
    series = decode(raw)
    assert series.values.dtype == np.float32
    np.testing.assert_array_equal(series.values, VALUES.astype(np.float32))
    assert series.times.dtype == np.float64
    assert series.times.tolist() == [0, 1, 2]


@pytest.mark.parametrize("raw", [[1, 2], [True, False], np.arange(3, dtype=np.uint8), pd.Series([1, 2]), b"1\n2\n"])
def test_one_axis_is_one_channel(raw: Any):
    assert decode(raw).values.shape[1:] == (1,)


def test_a_path_and_a_file_url_are_read(tmp_path: Path):
    place = tmp_path / "a series.csv"
    place.write_bytes(TABLE.to_csv(index=False).encode())
    for raw in (place, str(place), place.as_uri(), {"path": str(place)}):
        np.testing.assert_array_equal(decode(raw).values, VALUES.astype(np.float32))


DAY = 86400.0
STAMPS = [datetime(2024, 2, 28) + timedelta(days=i) for i in range(3)]


@pytest.mark.parametrize(("raw", "times"), [
    ({"values": VALUES, "times": [5, 5, 7.5]}, [0, 0, 2.5]),
    ({"values": VALUES, "times": torch.tensor([-1, 0, 2])}, [0, 1, 3]),
    ({"values": VALUES, "times": DAYS.to_numpy()}, [0, DAY, 2 * DAY]),
    ({"values": VALUES, "times": DAYS.to_numpy().astype("datetime64[s]")}, [0, DAY, 2 * DAY]),
    ({"values": VALUES, "times": np.array(["1600-01", "1600-02", "1600-03"], "M8[M]")}, [0, 31 * DAY, 60 * DAY]),
    ({"values": VALUES, "times": np.array([1, 2, 4], "timedelta64[m]")}, [0, 60, 180]),
    ({"values": VALUES, "times": STAMPS}, [0, DAY, 2 * DAY]),
    ({"values": VALUES, "times": [s.replace(tzinfo=UTC) for s in STAMPS]}, [0, DAY, 2 * DAY]),
    ({"values": VALUES, "times": ["2024-02-28", "2024-02-28T12:00:00+02:00", "2024-02-29T00:00:00Z"]}, [0, DAY * 5 / 12,
                                                                                                       DAY]),
    ({"values": TABLE, "times": [1, 2, 4]}, [0, 1, 3]),
    (TABLE.set_index(DAYS), [0, DAY, 2 * DAY]),
    (TABLE.set_index(DAYS.tz_localize("Europe/Berlin")), [0, DAY, 2 * DAY]),
    (TABLE.set_index(pd.Index([2.0, 4.0, 8.0])), [0, 2, 6]),
    (TABLE.set_index(pd.to_timedelta(["1h", "2h", "3h"])), [0, 3600, 7200]),
    (TABLE.set_index(DAYS).to_csv().encode(), [0, DAY, 2 * DAY]),
    (TABLE.set_index(DAYS).to_csv(header=False).encode(), [0, DAY, 2 * DAY]),
    ("\ufeffTime,a,b\n1,1,10\n3,2,\n4,3.5,-30\n".encode(), [0, 2, 3]),
    (parquet(TABLE.set_index(DAYS)), [0, DAY, 2 * DAY]),
    (parquet(TABLE.assign(time=DAYS)[["time", "a", "b"]]), [0, DAY, 2 * DAY]),
])  # fmt: skip
def test_times_count_from_the_first_step(raw: Any, times: list[float]):
    series = decode(raw)
    np.testing.assert_array_equal(series.values, VALUES.astype(np.float32))
    np.testing.assert_allclose(series.times, times, rtol=1e-12)


def test_nanoseconds_are_not_lost_in_seconds_since_1970():
    times = np.datetime64("2024-01-01", "ns") + np.arange(3).astype("timedelta64[ns]")
    assert decode({"values": VALUES, "times": times}).times.tolist() == pytest.approx([0, 1e-9, 2e-9], rel=1e-6)


BAD = [
    (None, "not a series"), (object(), "not a series"), (3.0, "not a series"), ({1, 2}, "not a series"),
    ({"value": [1]}, "not a series"), ({"values": [1], "rate": 2}, "not a series"),
    (np.array(1.0), "wrong shape"), (np.ones((2, 2, 2)), "wrong shape"), ([[1, 2], [3]], "wrong shape"),
    ([], "empty series"), (np.ones((0, 3)), "empty series"), (np.ones((3, 0)), "empty series"), (b"", "empty series"),
    (b"\n \n", "empty series"), (b"a,b\n", "empty series"), (b"time\n1\n2\n", "empty series"),
    (["1", "2"], "not numbers"), (np.array([1, "2"], dtype=object), "not numbers"), ([1j], "not numbers"),
    (torch.ones(2, dtype=torch.complex64), "not numbers"), (np.array(["2024"], "M8[Y]"), "not numbers"),
    (np.ma.masked_equal(np.array(["a", "b"]), "a"), "not numbers"),
    (TABLE.assign(c="x"), "not numbers"), (b"a,b\n1,x\n", "not numbers"), (npy(np.array([{}])), "not numbers"),
    ([NAN, NAN], "all missing"), ([[None], [None]], "all missing"), ([1.0, float("inf")], "not finite"),
    (b"1\n-inf\n", "not finite"), ([1e39], "value range"), ([10**400], "value range"),
    (b"1,2\n1,2,3\n", "damaged file"), (b"a,b\n1,2,3\n", "damaged file"), (b"PK\x03\x04", "damaged file"),
    (b"PAR1 and nothing", "damaged file"), (b"\x93NUMPY", "damaged file"), (npy(VALUES)[:-4], "damaged file"),
    (b"\xff\xfe\x00\x01", "damaged file"), (parquet(TABLE)[:-20] + b"PAR1", "damaged file"),
    ({"values": [1, 2], "times": [1]}, "bad times"), ({"values": [1, 2], "times": [1, NAN]}, "bad times"),
    ({"values": [1, 2], "times": ["yesterday", "today"]}, "bad times"), ({"values": [1], "times": [[1]]}, "bad times"),
    ({"values": [1, 2], "times": [0, 1e300]}, "bad times"), ({"values": [1, 2], "times": [True, True]}, "bad times"),
    ({"values": [1, 2], "times": np.array(["2024", "NaT"], "M8[s]")}, "bad times"),
    ({"values": [1, 2], "times": np.array([1, 2], "m8[M]")}, "bad times"), ({"values": [1], "times": []}, "bad times"),
    (TABLE.set_index(pd.Index(["x", "y", "z"])), "bad times"),
    ({"values": [1, 2, 3], "times": [0, 2, 1]}, "unsorted times"), (TABLE.set_index(DAYS[::-1]), "unsorted times"),
    ("/no/such/file.csv", "missing file"), ("/", "unreadable file"), ("https://example.org/a.csv", "url"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "cause"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_read_has_a_cause(raw: Any, cause: str):
    with pytest.raises(BadSampleError) as caught:
        decode(raw)
    assert caught.value.cause == cause


def test_messages_say_where_and_how_to_mend_it():
    with pytest.raises(BadSampleError, match="step 1 of channel 1 is infinite"):
        decode([[1, 2], [3, float("inf")]])
    with pytest.raises(BadSampleError, match="step 2 is before step 1; sort both"):
        decode({"values": [1, 2, 3], "times": [1, 5, 3]})
    with pytest.raises(BadSampleError, match="2 columns in the first line, 3 below"):
        decode(b"a,b\n1,2,3\n")
    with pytest.raises(BadSampleError, match="column 'c' is"):
        decode(TABLE.assign(c="x"))


@pytest.mark.parametrize(
    "raw", [np.ones(101), npy(np.ones(101)), b"1\n" * 101, parquet(pd.DataFrame({"a": range(101)}))]
)
def test_too_many_values_are_refused(raw: Any):
    with pytest.raises(BadSampleError, match="101 values are more than 100") as caught:
        decode(raw, max_values=100)
    assert caught.value.cause == "too long"
    assert len(decode(raw, max_values=101).values) == 101


def test_a_header_that_promises_more_than_memory_holds_is_refused_unread():
    header = b"{'descr':'<f8','fortran_order':False,'shape':(10000000000000,)}\n"
    with pytest.raises(BadSampleError, match="too long"):
        decode(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def test_a_pickle_inside_a_numpy_file_is_never_run():
    class Bomb:
        def __reduce__(self):
            return (sys.exit, ("ran",))

    with pytest.raises(BadSampleError, match="pickle"):
        decode(npy(np.array([Bomb()], dtype=object)))


def test_the_raw_value_is_left_alone():
    raw = VALUES.copy()
    decode(raw).values[:] = 7
    np.testing.assert_array_equal(raw, VALUES)
    raw = VALUES.astype(np.float32)
    decode(raw).values[:] = 7
    np.testing.assert_array_equal(raw, VALUES.astype(np.float32))
