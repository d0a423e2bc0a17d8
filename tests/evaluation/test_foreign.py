"""Images that others drew, as people have them: what is no row is refused, with its name and before the work."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orderrl import compose
from orderrl.evaluate import evaluate
from orderrl.evaluation.protocol import EvaluationProtocol
from orderrl.evaluation.rows import evaluate_foreign
from orderrl.evaluation.settings import EvalConfig
from orderrl.metrics.feature_names import DIGITS
from orderrl.metrics.references import Gaussian, Reference
from tests.helpers import tiny_backbone, tiny_images

BACKBONE = tiny_backbone(8, 8, vocab_size=17, num_classes=10)
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)


def npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def huge(path: Path) -> None:
    """A head of a few bytes that asks for 12 TB."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", head.getvalue())


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "levels in [0, 1]": (npz(arr_0=IMAGES / np.float32(255)), "must be uint8 images .* got float32"),
    "channels first": (npz(arr_0=IMAGES.transpose(0, 3, 1, 2)), r"must be uint8 images .* got uint8 \(8, 3, 8, 8\)"),
    "complex": (npz(arr_0=IMAGES.astype(np.complex64)), "must be uint8 images .* got complex64"),
    "one image": (npz(arr_0=IMAGES[:1]), "with n >= 2"),
    "another size": (npz(arr_0=IMAGES.repeat(2, 1).repeat(2, 2)), r"must be uint8 of shape \(n, 3, 8, 8\)"),
    "no pixels": (npz(arr_0=IMAGES[:, :0]), r"must be uint8 of shape \(n, 3, 8, 8\)"),
    "objects": (npz(arr_0=np.array([{}], dtype=object)), "cannot be read as .npz arrays"),
    "statistics that are not finite": (
        npz(arr_0=IMAGES, mu=np.full(64, np.nan), sigma=np.eye(64), features=DIGITS),
        "must be finite",
    ),
    "statistics alone": (npz(mu=np.zeros(64), sigma=np.eye(64), features=DIGITS), "holds statistics alone"),
    "a head that lies": (huge, "cannot be read as .npz arrays"),
    "nothing": (lambda path: path.touch(), "cannot be read as .npz arrays"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_set_of_images_is_refused_by_its_name_and_file(what: str, tmp_path: Path) -> None:
    write, expected = WRONG[what]
    path = tmp_path / "x=y, [z].npz"
    write(path)
    protocol = EvaluationProtocol(
        config=EvalConfig(features=DIGITS),
        seed=0,
        backbone=BACKBONE,
        backbone_name="tiny",
        data=tiny_images(BACKBONE),
        reference=Reference("x", DIGITS, Gaussian(np.zeros(64), np.eye(64))),
    )
    with pytest.raises(ValueError, match=expected) as caught:
        evaluate_foreign(protocol, "paper", path)
    assert str(caught.value).startswith(f"eval.foreign: paper={path}: ") and "\n" not in str(caught.value)


def test_images_that_are_not_there_are_refused_before_any_work(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("orderrl.evaluate.open_protocol", lambda *_: pytest.fail("began to work"))
    config = compose("evaluate", ["backbone=digits", "data=digits", f"cache_dir={tmp_path}", "eval.policies=[raster]"])
    config.eval.planners = []
    config.eval.foreign = [f"paper={tmp_path / 'none.npz'}"]
    with pytest.raises(ValueError, match=r"eval\.foreign: paper=.*none\.npz does not exist"):
        evaluate(config)


def test_two_rows_do_not_share_a_name() -> None:
    with pytest.raises(ValueError, match=r"foreign must give every name once, got 'a' twice"):
        EvalConfig(foreign=["a=x", "b=y", "a=z"])
