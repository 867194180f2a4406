"""From stores to examples: order, scaling, masks, what belongs together, what is withheld."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from training import (
    best,
    binned,
    equal_states,
    examples_of,
    job,
    kernel,
    logged,
    make_store,
    one_line_error,
    psftrain,
    words,
)

from psfgen.errors import ConfigError, FitError, PsfError, RunMismatch
from psfgen.store import open_store
from psfgen.store.verify import problems
from psftrain.conditioning import Conditioning, conditioning_document, conditioning_from, conditioning_of
from psftrain.config import DataConfig
from psftrain.data import (
    Places,
    fingerprint,
    open_stores,
    require_same,
    withhold,
)
from psftrain.fit import fit

Array = NDArray[Any]
RICH: dict[str, Any] = {"grid": 4, "depth": (500.0, 1000.0, math.inf), "focus": (800.0, 2000.0)}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three depths, two focus distances, 4 x 4 points, a masked place in one of them."""
    dark = [np.s_[1, 2, 0, 3, 1], np.s_[0, 0, 2, 2, :]]
    return make_store(tmp_path_factory.mktemp("rich") / "s.zarr", **RICH, dark=dark)


# --- the stores of these tests ----------------------------------------------------------------------------------------


def test_the_stores_of_these_tests_are_sound(rich: Path, tmp_path: Path) -> None:
    assert list(problems(open_store(rich))) == []
    other = make_store(tmp_path / "s.zarr", grid=3, layout="random", sensor_mm=(6, 4), kernel_px=12, bins=4, seed=3)
    assert list(problems(open_store(other))) == []


def test_the_kernels_of_these_tests_have_an_axis_and_no_other_symmetry() -> None:
    """Turned with the field, not round, not the same outwards as inwards."""
    x, wavelength = np.array([0.8]), np.array([0.48, 0.64])
    (right,) = kernel(x, 0 * x, 1.0, 0.5, wavelength, 9)
    (up,) = kernel(0 * x, x, 1.0, 0.5, wavelength, 9)
    assert up == pytest.approx(np.rot90(right, 1, (-2, -1)))
    assert right == pytest.approx(right[:, ::-1])
    assert np.abs(right - right[..., ::-1]).max() > 0.01
    assert np.abs(right - up).max() > 0.01


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", ["psf_binned", "psf"])
def test_every_example_is_the_kernel_of_its_place(rich: Path, array: str) -> None:
    """Channels ascend in wavelength, rows run down from +y, and the formula says what stands there."""
    store = open_store(rich)
    examples, _ = examples_of(rich, array=array)
    assert len(examples) == 3 * 2 * 16 - 2
    assert examples.kernels.dtype == torch.float32
    kernels = store.read(array)
    side = kernels.shape[-1]
    assert examples.kernels.shape[1:] == (3, side, side)
    for example, (number, copy, focus, depth, row, column) in zip(examples.kernels, examples.index, strict=True):
        assert (number, copy) == (0, 0)
        assert np.array_equal(example.numpy(), kernels[focus, depth, row, column])
        x, y = store.coords["field_x"][column], store.coords["field_y"][row]
        dioptres = store.coords["depth_dioptre"][depth], store.coords["focus_dioptre"][focus]
        drawn = kernel(x, y, *dioptres, np.array([0.48, 0.55, 0.64]), 10)
        assert example.numpy() == pytest.approx(drawn if array == "psf" else binned(drawn, 5), abs=1e-6)


def test_slices_find_every_example_again(rich: Path) -> None:
    examples, _ = examples_of(rich)
    assert len(examples.slices) == 6
    for slice_number, slice_ in enumerate(examples.slices):
        assert slice_.shape == (4, 4)
        for (row, column), number in np.ndenumerate(slice_.numpy()):
            if number >= 0:
                depth, focus = divmod(slice_number, 2)
                assert examples.index[number].tolist() == [0, 0, focus, depth, row, column]
    lit = torch.cat([slice_.flatten() for slice_ in examples.slices])
    assert sorted(lit[lit >= 0].tolist()) == list(range(len(examples)))


def test_the_noise_of_an_example_is_that_of_its_whole_stack(rich: Path) -> None:
    """Relative errors of channels add up by their energies."""
    store = open_store(rich)
    examples, _ = examples_of(rich)
    kernels, relative = store.read("psf_binned"), store.read("noise_binned")
    for noise, (*_, focus, depth, row, column) in zip(examples.noise, examples.index, strict=True):
        norms = np.linalg.norm(kernels[focus, depth, row, column], axis=(-2, -1))
        expected = np.linalg.norm(relative[focus, depth, row, column] * norms) / np.linalg.norm(norms)
        assert float(noise) == pytest.approx(expected, rel=1e-5)


def test_full_size_kernels_bring_their_own_noise(rich: Path) -> None:
    """In these stores twice that of the bins."""
    binned_, full = examples_of(rich)[0], examples_of(rich, array="psf")[0]
    assert torch.all(full.noise > 1.5 * binned_.noise)


# --- conditions -------------------------------------------------------------------------------------------------------


def test_conditions_are_scaled_to_the_training_range(rich: Path) -> None:
    """field / field_max; depth and focus in dioptres to [-1, 1]; infinity is 0 dioptres."""
    examples, conditioning = examples_of(rich)
    assert conditioning.depth_dioptre == (0.0, 2.0)
    assert conditioning.focus_dioptre == (0.5, 1.25)
    axis, depth, focus = np.linspace(-1, 1, 4), {0: 1.0, 1: 0.0, 2: -1.0}, {0: 1.0, 1: -1.0}
    for condition, (*_, f, d, row, column) in zip(examples.condition.tolist(), examples.index, strict=True):
        assert condition == pytest.approx([axis[column], axis[row], depth[d], focus[f]], abs=1e-6)


@pytest.mark.parametrize("field_max", [0.6, 1.0, 1.3])
def test_the_field_is_scaled_by_the_largest(tmp_path: Path, field_max: float) -> None:
    examples, conditioning = examples_of(make_store(tmp_path / "s.zarr", grid=3, field_max=field_max))
    assert conditioning.field_max == field_max
    assert examples.condition[:, :2].abs().max() == 1


def test_the_axis_alone_is_a_field_too(tmp_path: Path) -> None:
    examples, conditioning = examples_of(make_store(tmp_path / "s.zarr", grid=1))
    assert examples.condition.tolist() == [[0, 0, 0, 0]]
    assert conditioning.grid == 1


@pytest.mark.parametrize("distance", [700.0, math.inf])
def test_a_single_distance_is_zero(tmp_path: Path, distance: float) -> None:
    path = make_store(tmp_path / "s.zarr", grid=2, depth=(distance,), focus=(distance,))
    examples, conditioning = examples_of(path)
    assert (examples.condition[:, 2:] == 0).all()
    assert conditioning.varies == []


@pytest.mark.parametrize(
    ("layout", "varies"),
    [({"depth": (1.0, 2.0)}, ["depth"]), ({"focus": (1.0, math.inf)}, ["focus"]), (RICH, ["depth", "focus"])],
)
def test_what_varies_is_named(tmp_path: Path, layout: dict[str, Any], varies: list[str]) -> None:
    assert examples_of(make_store(tmp_path / "s.zarr", **{"grid": 2, **layout}))[1].varies == varies


def test_the_sensor_sides_and_the_grid_are_kept(tmp_path: Path) -> None:
    _, conditioning = examples_of(make_store(tmp_path / "s.zarr", grid=6, layout="cells", sensor_mm=(8.0, 6.0)))
    assert conditioning.aspect == 0.75
    assert conditioning.grid == 5


def test_a_conditioning_survives_as_plain_data(rich: Path) -> None:
    _, conditioning = examples_of(rich)
    assert conditioning_from(json.loads(json.dumps(conditioning_document(conditioning)))) == conditioning


RANGE = Conditioning(field_max=1.0, depth_dioptre=(0.0, 2.0), focus_dioptre=(0.5, 0.5), aspect=1.0, grid=5)


@pytest.mark.parametrize(
    ("depth", "focus", "named"),
    [
        ([0.0, 2.0], [0.5], None),
        ([1.3], [0.5 * (1 + 1e-9)], None),
        ([1.0, 2.1], [0.5], "depth 476.19 mm is outside the range trained on, 500 mm to inf"),
        ([1.0], [0.4], "focus 2500 mm is outside the range trained on, 2000 mm to 2000 mm"),
        ([1.0], [0.0], "focus inf is outside"),
    ],
)
def test_distances_beyond_the_trained_ones_are_refused(
    depth: list[float], focus: list[float], named: str | None
) -> None:
    if named is None:
        RANGE.require(np.array(depth), np.array(focus), "this")
        return
    with pytest.raises(RunMismatch, match=named):
        RANGE.require(np.array(depth), np.array(focus), "this")


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masked_places_are_dropped_and_counted(rich: Path) -> None:
    """One dark channel masks the stack; the places of other slices stay."""
    examples, _ = examples_of(rich)
    assert examples.masked == 2
    assert int(examples.slices[0][2, 2]) == -1
    assert int(examples.slices[5][0, 3]) == -1
    assert sum(int((slice_ < 0).sum()) for slice_ in examples.slices) == 2
    assert examples.kernels.isfinite().all()
    assert examples.noise.isfinite().all()


def spoil(array: str) -> Any:
    """Make one kernel NaN, and perhaps what belongs to it, though light arrives."""

    def change(name: str, values: Array) -> None:
        if name in array.split("+"):
            values[0, 0, 1, 2, 0] = np.nan

    return change


@pytest.mark.parametrize("array", ["psf_binned", "psf_binned+noise_binned", "noise_binned"])
def test_nan_where_light_arrives_is_corruption(tmp_path: Path, array: str) -> None:
    """Missing is throughput 0 or captured 0, and nothing else is."""
    path = make_store(tmp_path / "s.zarr", grid=4, change=spoil(array))
    assert list(problems(open_store(path)))
    with pytest.raises(PsfError, match="NaN") as raised:
        examples_of(path)
    assert str(path) in str(raised.value)
    assert raised.value.exit_code == 1


def test_nan_in_part_of_a_kernel_is_corruption(tmp_path: Path) -> None:
    def change(name: str, values: Array) -> None:
        if name == "psf_binned":
            values[0, 0, 0, 0, 1, 2, 3] = np.nan

    with pytest.raises(PsfError, match="NaN"):
        examples_of(make_store(tmp_path / "s.zarr", grid=3, change=change))


def test_a_store_without_any_light_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"without light; .*--field-max"):
        examples_of(make_store(tmp_path / "s.zarr", grid=2, dark=[np.s_[...]]))


def test_a_dark_depth_among_others_is_left_out(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s.zarr", grid=3, depth=(500.0, 1000.0), dark=[np.s_[:, 0]])
    examples, _ = examples_of(path)
    assert (len(examples), examples.masked) == (9, 9)


# --- several stores ---------------------------------------------------------------------------------------------------


def test_several_stores_are_one_training_set(rich: Path, tmp_path: Path) -> None:
    """Examples follow one another; the conditioning spans them all."""
    other = make_store(tmp_path / "t.zarr", grid=3, layout="random", field_max=1.2, depth=(250.0,), focus=(1000.0,))
    both, conditioning = examples_of(rich, other)
    one, two = (examples_of(path)[0] for path in (rich, other))
    assert torch.equal(both.kernels, torch.cat([one.kernels, two.kernels]))
    assert torch.equal(both.noise, torch.cat([one.noise, two.noise]))
    assert both.masked == 2
    assert np.array_equal(both.index[:, 0], [0] * len(one) + [1] * 9)
    assert len(both.slices) == 7
    assert sorted(both.slices[6].flatten().tolist()) == list(range(len(one), len(one) + 9))
    assert conditioning.depth_dioptre == (0, 4)
    assert conditioning.focus_dioptre == (0.5, 1.25)
    assert conditioning.grid == 3
    reach = [float(np.abs(open_store(other).coords[name]).max()) for name in ("field_x", "field_y")]
    assert conditioning.field_max == max(1.0, *reach)
    assert (both.condition.abs() <= 1).all()


LENSES: list[tuple[str, dict[str, Any]]] = [
    ("lens_sha256", {"lens_text": '{"info": "another lens"}'}),
    ("fnum", {"settings": {"fnum": 4.0}}),
    ("sensor_mm", {"sensor_mm": (9.0, 9.0)}),
]
DIFFERENT: list[tuple[str, dict[str, Any]]] = [
    ("pitch_um", {"pitch_um": 5.0}),
    ("kernel_px", {"kernel_px": 15}),
    ("bins", {"bins": 10}),
    ("wavelength", {"wavelength": (0.48, 0.55, 0.65)}),
    ("wavelength", {"wavelength": (0.48, 0.55)}),
    ("sensor_aspect", {"sensor_mm": (6.0, 4.0)}),
    ("reference_um", {"settings": {"reference_um": 0.55}}),
]


@pytest.mark.parametrize(("key", "change"), DIFFERENT)
def test_stores_that_do_not_belong_together_are_refused(tmp_path: Path, key: str, change: dict[str, Any]) -> None:
    """As training stores side by side, and as the validation store."""
    a = make_store(tmp_path / "a.zarr", grid=3)
    b = make_store(tmp_path / "b.zarr", **{"grid": 3, **change})
    with pytest.raises(RunMismatch, match=rf"b\.zarr.*: {key} is "):
        open_stores([str(a), str(b)], "psf_binned")
    asked = key if key != "sensor_aspect" else "sensor_mm"  # a lens on another sensor is not the one trained on
    for name, given in ((key, ["--store", a, "--store", b]), (asked, ["--store", a, "--val", b])):
        ran = psftrain("fit", *given, "--run", tmp_path / "run", "--set", "batch=4")
        assert ran.code == 2
        assert f"{name} is " in one_line_error(ran)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "change"), LENSES)
def test_stores_of_several_lenses_train_one_model(tmp_path: Path, key: str, change: dict[str, Any]) -> None:
    """But each is known by name: a lens that was not trained on is no validation store."""
    a = make_store(tmp_path / "a.zarr", grid=3)
    b = make_store(tmp_path / "b.zarr", **{"grid": 3, **change})
    stores = open_stores([str(a), str(b)], "psf_binned")
    both = fingerprint(stores, "psf_binned")
    assert [lens[key] for lens in both["lenses"]] == [fingerprint([s], "psf_binned")["lenses"][0][key] for s in stores]
    assert len({json.dumps(lens) for lens in both["lenses"]}) == 2
    for store in stores:
        require_same(both, fingerprint([store], "psf_binned"), "one of them")
    ran = psftrain("fit", *words(a, tmp_path / "run"), "--val", b)
    assert ran.code == 2
    assert f"{key} is " in one_line_error(ran)
    fit(job([a, b], tmp_path / "run", steps=2))
    other_points = make_store(tmp_path / "v.zarr", **{"grid": 4, **change})
    fit(job([a, b], tmp_path / "other", steps=2, val=str(other_points)))


def test_a_lens_is_compared_with_the_one_most_like_it(tmp_path: Path) -> None:
    """Of those trained on: the message names what differs from that."""
    changes: list[dict[str, Any]] = [{}, {"lens_text": "{}"}, {"lens_text": "{}", "settings": {"fnum": 4.0}}]
    one, two, other = (
        open_store(make_store(tmp_path / f"{i}.zarr", grid=2, **change)) for i, change in enumerate(changes)
    )
    with pytest.raises(RunMismatch, match=r"this: fnum is 4\.0, but None was trained on"):
        require_same(fingerprint([one, two], "psf"), fingerprint([other], "psf"), "this")


def test_a_fingerprint_is_what_the_contract_names(rich: Path) -> None:
    store = open_store(rich)
    expected = {
        "lenses": [{"lens_sha256": store.attrs["lens"]["sha256"], "fnum": None, "sensor_mm": [6.0, 6.0]}],
        "pitch_um": 4.0,
        "kernel_px": 10,
        "bins": 5,
        "wavelength": [0.48, 0.55, 0.64],
    }
    found = fingerprint([store], "psf_binned")
    assert {key: found[key] for key in expected} == expected
    assert found != fingerprint([store], "psf")
    require_same(found, json.loads(json.dumps(found)), "plain data")


# --- what is withheld -------------------------------------------------------------------------------------------------


def withheld_places(examples: Places) -> list[set[tuple[int, int]]]:
    return [{(r, c) for (r, c), number in np.ndenumerate(s.numpy()) if number < 0} for s in examples.slices]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_interior_points_are_withheld_at_every_depth_and_focus(tmp_path: Path, share: float) -> None:
    path = make_store(tmp_path / "s.zarr", grid=7, depth=(500.0, 900.0, math.inf), focus=(800.0, 2000.0))
    examples, _ = examples_of(path)
    train, val, _ = withhold(examples.places, DataConfig(val=share), seed=5)
    assert val is not None
    gone = withheld_places(train)
    assert all(places == gone[0] for places in gone), "so that no other depth gives them away"
    assert len(gone[0]) == round(share * 25)
    assert all(0 < row < 6 and 0 < column < 6 for row, column in gone[0])
    assert len(train) + len(val) == len(examples)
    assert len(val) == 6 * len(gone[0])
    assert {(row, column) for *_, row, column in val.index.tolist()} == gone[0]


def test_withheld_examples_keep_their_kernels_and_conditions(tmp_path: Path) -> None:
    examples, _ = examples_of(make_store(tmp_path / "s.zarr", grid=6, depth=(500.0, 900.0)))
    taken, left, _ = withhold(examples.places, DataConfig(val=0.3), seed=0)
    assert left is not None
    train, val = examples.of(taken), examples.of(left)
    whole = {
        tuple(i): (k, c, n)
        for i, k, c, n in zip(
            examples.index.tolist(), examples.kernels, examples.condition, examples.noise, strict=True
        )
    }
    for part in (train, val):
        for place, *values in zip(part.index.tolist(), part.kernels, part.condition, part.noise, strict=True):
            assert equal_states(values, list(whole[tuple(place)]))
        for number, slice_ in enumerate(part.slices):
            for (row, column), example in np.ndenumerate(slice_.numpy()):
                if example >= 0:
                    assert part.index[example].tolist() == [0, 0, 0, number, row, column]


def test_the_seed_chooses_what_is_withheld(tmp_path: Path) -> None:
    examples, _ = examples_of(make_store(tmp_path / "s.zarr", grid=9))
    chosen = [withheld_places(withhold(examples.places, DataConfig(val=0.2), seed)[0])[0] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_nothing_is_withheld_unless_asked_for(tmp_path: Path) -> None:
    examples, _ = examples_of(make_store(tmp_path / "s.zarr", grid=4))
    train, val, record = withhold(examples.places, DataConfig(), 0)
    assert train is examples.places
    assert val is None
    assert record == {"field": [], "depth_mm": [], "focus_mm": [], "train": 16, "val": 0, "masked": 0}


@pytest.mark.parametrize(("grid", "share"), [(2, 0.5), (3, 0.1)])
def test_a_grid_too_small_to_withhold_from_says_so(tmp_path: Path, grid: int, share: float) -> None:
    examples, _ = examples_of(make_store(tmp_path / "s.zarr", grid=grid))
    with pytest.raises(FitError, match=r"data\.val .* withholds no point.*--val STORE"):
        withhold(examples.places, DataConfig(val=share), 0)


def test_masked_points_are_not_withheld_twice(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s.zarr", grid=5, depth=(500.0, 900.0), dark=[np.s_[:, 0, 1:4, 1:4]])
    examples, _ = examples_of(path)
    train, val, _ = withhold(examples.places, DataConfig(val=0.5), 0)
    assert val is not None
    assert set(val.index[:, 3].tolist()) == {1}, "the first depth has no light inside"
    assert withheld_places(train)[0] == {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}


THREE: dict[str, Any] = {"depth": (400.0, 500.0, 900.0, 2000.0, math.inf), "focus": (800.0, 1000.0, 2000.0)}


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_interior_distances_are_withheld_whole(tmp_path: Path, seed: int) -> None:
    """Never the nearest or the farthest, at every field point and in every copy."""
    places = examples_of(make_store(tmp_path / "s.zarr", grid=3, copies=2, **THREE))[0].places
    train, val, record = withhold(places, DataConfig(val_depth=2, val_focus=1), seed)
    assert val is not None
    depths, focuses = (
        {float(THREE[name][at]) for at in set(places.index[:, column]) - set(train.index[:, column])}
        for name, column in (("depth", 3), ("focus", 2))
    )
    assert len(depths) == 2
    assert depths <= {500.0, 900.0, 2000.0}
    assert focuses == {1000.0}
    assert (record["depth_mm"], record["focus_mm"], record["field"]) == (sorted(depths), [1000.0], [])
    assert len(train) == 2 * 3 * 2 * 9
    assert len(train) + len(val) == len(places)
    assert (record["train"], record["val"], record["masked"]) == (len(train), len(val), 0)


def test_the_seed_chooses_the_distances(tmp_path: Path) -> None:
    places = examples_of(make_store(tmp_path / "s.zarr", grid=2, **THREE))[0].places
    chosen = [withhold(places, DataConfig(val_depth=1), seed)[2]["depth_mm"] for seed in range(12)]
    assert {depth for (depth,) in chosen} == {500.0, 900.0, 2000.0}
    assert withhold(places, DataConfig(val_depth=1), 5)[2]["depth_mm"] == chosen[5]


def test_a_distance_is_withheld_from_every_store_that_has_it(tmp_path: Path) -> None:
    """Unless it is the last of one of them, which would be extrapolated to."""
    paths = [
        make_store(tmp_path / f"{i}.zarr", grid=2, depth=depth)
        for i, depth in enumerate([(400.0, 700.0, 900.0, 2000.0), (300.0, 700.0 * (1 + 1e-12), 900.0)])
    ]
    places = examples_of(*paths)[0].places
    for seed in range(5):
        train, _, record = withhold(places, DataConfig(val_depth=1), seed)
        assert record["depth_mm"] == [700.0]
        assert len(train) == len(places) - 2 * 4


def test_points_and_distances_are_withheld_together(tmp_path: Path) -> None:
    """The record is plain data and says which."""
    places = examples_of(make_store(tmp_path / "s.zarr", grid=5, **THREE, dark=[np.s_[:, 0, 0, 0, :]]))[0].places
    train, val, record = withhold(places, DataConfig(val=0.3, val_depth=1), 2)
    assert val is not None
    assert json.loads(json.dumps(record)) == record
    assert len(record["field"]) == round(0.3 * 9)
    held = {tuple(point) for point in record["field"]}
    points = places.condition[:, :2].double().numpy()
    for position, number in enumerate(places.number.tolist()):
        is_held = tuple(points[position]) in held or THREE["depth"][places.index[position, 3]] in record["depth_mm"]
        assert is_held == (number in val.number) == (number not in train.number)
    assert record["masked"] == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"val_depth": 4}, r"data\.val_depth 4: the stores have 3 interior depth values .*--set data\.val_depth=3"),
        ({"val_focus": 2}, r"data\.val_focus 2: the stores have 1 interior focus values"),
    ],
)
def test_too_few_distances_to_withhold_from(tmp_path: Path, config: dict[str, int], message: str) -> None:
    path = make_store(tmp_path / "s.zarr", grid=4, **THREE)
    with pytest.raises(ConfigError, match=message):
        withhold(examples_of(path)[0].places, DataConfig.model_validate(config), 0)
    given = {f"data__{key}": value for key, value in config.items()}
    ran = psftrain("fit", *words(path, tmp_path / "run", **given))
    assert ran.code == 2
    assert re.search(message, one_line_error(ran))


def test_nothing_left_to_train_on_is_told(tmp_path: Path) -> None:
    dark = [np.s_[:, 0], np.s_[:, 2]]
    path = make_store(tmp_path / "s.zarr", grid=3, depth=(500.0, 900.0, 2000.0), dark=dark)
    with pytest.raises(FitError, match="leave nothing to train on"):
        withhold(examples_of(path)[0].places, DataConfig(val_depth=1), 0)


# --- neighbours -------------------------------------------------------------------------------------------------------


def test_neighbours_stand_to_the_right_and_below(rich: Path) -> None:
    """In the same slice, where both have light and neither is withheld."""
    places = withhold(examples_of(rich)[0].places, DataConfig(val=0.3), 0)[0]
    at = {tuple(place): position for position, place in enumerate(places.index.tolist())}
    for (*slice_, row, column), (right, below) in zip(places.index.tolist(), places.neighbours().tolist(), strict=True):
        assert right == at.get((*slice_, row, column + 1), -1)
        assert below == at.get((*slice_, row + 1, column), -1)


# --- copies -----------------------------------------------------------------------------------------------------------


def test_copies_are_further_slices(tmp_path: Path) -> None:
    """Store, copy, depth, focus is their order; the kernels are those of the copy."""
    path = make_store(tmp_path / "s.zarr", copies=3, **RICH)
    store, (examples, _) = open_store(path), examples_of(path)
    assert len(examples.slices) == 3 * 3 * 2
    kernels = store.read("psf_binned")
    assert np.abs(kernels[0] - kernels[2]).max() > 0.001
    for number, slice_ in enumerate(examples.slices):
        copy, depth, focus = np.unravel_index(number, (3, 3, 2))
        found = examples.kernels[slice_.flatten()].view(4, 4, *examples.kernels.shape[1:])
        assert np.array_equal(found, kernels[copy, focus, depth])
        assert (examples.index[slice_.flatten(), :4] == [0, copy, focus, depth]).all()


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "batch", "code"), [(3, 9, 0), (3, 10, 2), (2, 5, 2)])
def test_a_batch_is_no_larger_than_the_data(tmp_path: Path, grid: int, batch: int, code: int) -> None:
    path = make_store(tmp_path / "s.zarr", grid=grid)
    ran = psftrain("fit", *words(path, tmp_path / "run", batch=batch, steps=1))
    assert ran.code == code
    if code:
        assert f"batch {batch} is larger than the {grid**2} examples; --set batch={grid**2}" in one_line_error(ran)
        assert not (tmp_path / "run").exists()


def test_the_advised_batch_fits(tmp_path: Path) -> None:
    """Counting what has light, less what is withheld."""
    path = make_store(tmp_path / "s.zarr", grid=4, dark=[np.s_[..., 0, 0, :]])
    ran = psftrain("fit", *words(path, tmp_path / "run", batch=99, steps=1, data__val=0.5))
    advised = int(one_line_error(ran).rpartition("batch=")[2])
    assert advised == 16 - 1 - 2
    fit(job(path, tmp_path / "run", batch=advised, steps=1, data__val=0.5))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["examples"] == advised


def test_the_conditioning_comes_from_the_training_stores(tmp_path: Path) -> None:
    """Not from what is left after withholding, nor from a validation store."""
    path = make_store(tmp_path / "s.zarr", grid=4, depth=(500.0, 1000.0))
    val = make_store(tmp_path / "v.zarr", grid=3, layout="cells", depth=(700.0,))
    fit(job(path, tmp_path / "run", steps=1, val=str(val)))
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert conditioning_from(document["conditioning"]) == conditioning_of([open_store(path)])


# --- both formats -----------------------------------------------------------------------------------------------------


def test_a_run_does_not_depend_on_the_format_of_its_store(tmp_path: Path) -> None:
    """Examples and every logged number are the same to the last bit."""
    stores = [make_store(tmp_path / name, depth=(1000.0, 2000.0)) for name in ("psfs.zarr", "psfs.h5")]
    assert [open_store(path).format for path in stores] == ["zarr", "hdf5"]
    (one, _), (other, _) = (examples_of(path) for path in stores)
    assert torch.equal(one.kernels, other.kernels)
    assert torch.equal(one.condition, other.condition)
    runs = [tmp_path / f"run-{path.suffix[1:]}" for path in stores]
    for path, run in zip(stores, runs, strict=True):
        fit(job(path, run, steps=6))
    assert logged(runs[0]) == logged(runs[1])
    assert equal_states(best(runs[0])["model"], best(runs[1])["model"])
